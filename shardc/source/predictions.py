"""What the plan predicts, as generated code tells it: beside each collective, and in the docstring of the module."""

from __future__ import annotations

from torch import fx

from shardc.analysis.axis_roles import parallelism_of
from shardc.analysis.recorded_memory import recorded_memory
from shardc.analysis.timeline import Times
from shardc.cost.clock import Clock, Flight
from shardc.ir.partition import partition
from shardc.ir.printing import in_bytes, in_seconds
from shardc.planning.compilation import Compilation
from shardc.planning.scheduled import scheduled
from shardc.runtime.collectives.collective import wait
from shardc.source.frees import Holding
from shardc.source.module import Once, Predicted


def predicted(c: Compilation) -> Predicted:
    """What the docstring and the comments say, and what is held line by line. Of a program for many sizes nothing is
    told but what holds for all of them."""
    if not c.has("schedule"):
        return Predicted()
    if c.dims:
        return Predicted(tuple([*parallelism(c), "", *_LEGEND]), prologue=_once(c.prologue), epilogue=_once(c.epilogue))
    return Predicted(tuple(_docstring(c)), _Remarks(c).of, _held(c), _once(c.prologue), _once(c.epilogue))


def _once(c: Compilation | None) -> Once | None:
    return None if c is None else Once(c.lowered.read(), c.program, _Remarks(c).of)


def _held(c: Compilation) -> Holding:
    """What a rank holds while each line runs."""
    step = scheduled(c)
    memory = recorded_memory(step.memory, step.forward, step.backward)
    lines = {half: [one.total for one in memory.moments if one.phase == half] for half in ("forward", "backward")}
    return Holding(lines, memory.storages, memory.peak)


class _Remarks:
    """Per collective: what it sends over which axis, how long that takes alone, and how much of it is hidden."""

    def __init__(self, c: Compilation) -> None:
        self.c = c
        graph = c.lowered.read()
        run = partition(graph, c.program)
        self.times = Times(run, c.pace)
        self.hidden = {**self._hidden(run.forward), **self._hidden(run.backward)}

    def _hidden(self, nodes: list[fx.Node]) -> dict[fx.Node, float]:
        """Per collective that is started, the part of it during which the rank computes; with one clock for all."""
        clock = Clock(self.c.mesh, self.c.options.device)
        flights, found = dict[fx.Node, Flight](), dict[fx.Node, float]()
        for node in nodes:
            if node.target is wait:
                source = node.args[0]
                assert isinstance(source, fx.Node)
                flight = flights.pop(source, None)
                if flight is not None:
                    rest = clock.rest(flight)
                    found[source] = 1.0 - min(rest / self.times.sent[source], 1.0)
                    clock.wait(flight)
                continue
            self.times.run(node, clock)
            seconds = self.times.sent.get(node, 0.0)
            if seconds and any(user.target is wait for user in node.users):
                flights[node] = clock.start(str(node.kwargs["axis"]), seconds)
            elif seconds:
                clock.run(str(node.kwargs["axis"]), seconds)
        return found

    def of(self, node: fx.Node) -> str:
        """`2.0 MiB, 20.00 us, hidden`; "" for what sends nothing. The axis stands in the call."""
        step = None if node.target is wait else self.c.pace.step(node)
        if step is None or step[0].local or not self.times.sent.get(node):
            return ""
        axis = str(node.kwargs["axis"])
        sent = step[0].sent(self.c.mesh.sizes[axis], step[1])
        part = self.hidden.get(node, 0.0)
        hidden = ", hidden" if part > 0.995 else f", {part:.0%} hidden" if part > 0.005 else ""
        return f"{in_bytes(sent)}, {in_seconds(step[2])}{hidden}"


def parallelism(c: Compilation) -> list[str]:
    """What each axis of the mesh does, a line an axis."""
    return parallelism_of(c.lowered.read(), c.factored, c.mesh).lines if c.has("factored") else []


def _docstring(c: Compilation) -> list[str]:
    memory, schedule = c.schedule.memory, c.schedule
    proof, proved = "planned at other sizes; no bound was proved", c.solution
    if proved is None and c.given is not None:
        proved = c.given.proof
    if proved is not None:
        gap = 1.0 - proved.lower_bound / proved.cost if proved.cost else 0.0
        plan = "no plan near it" if c.has("network") and c.network.offers is not None else "no plan"
        proof = f"{plan} costs less" if gap < 1e-6 else f"{plan} costs less than {1.0 - gap:.1%} of it"
    step = "step" if c.program.microbatches is None else "micro-batch"
    return [
        *parallelism(c),
        "",
        f"Predicted on {c.options.device.name}: {in_seconds(schedule.seconds)} a {step}, of which "
        f"{in_seconds(max(schedule.hidden, 0.0))} of collectives are hidden; {memory.summary}. Proof: {proof}.",
        "",
        *_LEGEND,
    ]


_LEGEND = (
    "Behind a value: its dtype, its global shape, @ which axes split a dim; +sum@ over which axes a sum is to come.",
    "Behind a collective: what a rank sends, and how long that takes alone.",
    "Runs with torch and shardc.runtime alone.",
)
"""How the comments are read."""
