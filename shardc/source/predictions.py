"""What the plan predicts, as generated code tells it: beside each collective, and in the docstring of the module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import fx

from shardc.analysis.memory import MemoryAnalysis
from shardc.analysis.timeline import Times
from shardc.cost.clock import Clock
from shardc.ir.facts import laid, lowered
from shardc.ir.mesh import Mesh
from shardc.ir.partition import partition
from shardc.ir.printing import in_bytes, in_seconds
from shardc.ir.program import Role
from shardc.planning.compilation import Compilation
from shardc.runtime.collectives.collective import wait
from shardc.source.frees import Held
from shardc.source.module import Predicted


def predicted(c: Compilation) -> Predicted:
    """What the docstring and the comments say, and what is held line by line. Of a program for many sizes nothing is
    told but what holds for all of them."""
    if c.dims:
        return Predicted(tuple(parallelism(c)))
    return Predicted(tuple(_docstring(c)), _Told(c).of, _held(c))


def _held(c: Compilation) -> Held:
    """What a rank holds while each line runs."""
    graph = c.schedule.bucketed.read()
    run = partition(graph, c.program)
    by_name = {node.name: node for node in graph.nodes}
    order = [(by_name[name], awaited) for name, awaited in c.schedule.order]
    first = set(run.forward)
    halves = [one for one in order if one[0] in first], [one for one in order if one[0] not in first]
    lines = MemoryAnalysis(graph, run, c.program, c.mesh, c.states).line_by_line(*halves)
    return Held(lines.held, lines.storages, lines.peak)


class _Told:
    """Per collective: what it sends over which axis, how long that takes alone, and how much of it is hidden."""

    def __init__(self, c: Compilation) -> None:
        self.c = c
        graph = c.lowered.read()
        run = partition(graph, c.program)
        self.times = Times(run, c.pace)
        self.hidden = {**self._hidden(run.forward), **self._hidden(run.backward)}

    def _hidden(self, nodes: list[fx.Node]) -> dict[fx.Node, float]:
        """Per collective that is started, the part of it during which the rank computes; with one clock for all."""
        clock, flights, found = Clock(self.c.mesh, self.c.options.device), dict[fx.Node, object](), dict[fx.Node, float]()
        for node in nodes:
            if node.target is wait:
                source = node.args[0]
                assert isinstance(source, fx.Node)
                flight = flights.pop(source, None)
                if flight is not None:
                    rest = clock.rest(flight)  # type: ignore[arg-type]
                    found[source] = 1.0 - min(rest / self.times.sent[source], 1.0)
                    clock.wait(flight)  # type: ignore[arg-type]
                continue
            self.times.run(node, clock)
            seconds = self.times.sent.get(node, 0.0)
            if seconds and any(user.target is wait for user in node.users):
                flights[node] = clock.start(str(node.kwargs["axis"]), seconds)
            elif seconds:
                clock.run(str(node.kwargs["axis"]), seconds)
        return found

    def of(self, node: fx.Node) -> str:
        """`2.0 MiB over tp, 20.00 us, hidden`; "" for what sends nothing."""
        step = None if node.target is wait else self.c.pace.step(node)
        if step is None or step[0].local or not self.times.sent.get(node):
            return ""
        axis = str(node.kwargs["axis"])
        sent = step[0].sent(self.c.mesh.sizes[axis], step[1])
        part = self.hidden.get(node, 0.0)
        hidden = ", hidden" if part > 0.995 else f", {part:.0%} hidden" if part > 0.005 else ""
        return f"{in_bytes(sent)} over {axis}, {in_seconds(step[2])}{hidden}"


def parallelism(c: Compilation) -> list[str]:
    """What each axis of the mesh does, a sentence an axis."""
    graph = c.lowered.read()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    split: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for node, port in zip(placeholders, c.program.inputs, strict=True):
        if port.role not in (Role.PARAMETER, Role.INPUT):
            continue
        for dim, atoms in enumerate(laid(node).simplify(c.mesh).dims):
            for axis in (axis.partition("~")[0] for atom in atoms for axis in atom.axes):
                kind = "input" if port.role is Role.INPUT else "parameter"
                split[axis][f"{kind} {dim}"].append(port.name)
    sent = _sent(graph, c.mesh)
    lines: list[str] = []
    for axis, size in c.mesh.sizes.items():
        words = [_splits(where, names) for where, names in split[axis].items()]
        words += [f"in {phase} {', '.join(f'{count} {name}' for name, count in found.items())}"
                  for phase, found in sent.get(axis, {}).items()]  # fmt: skip
        lines.append(f"{axis} ({size} ranks): {'; '.join(words) or 'nothing is split over it'}")
    return lines


def _splits(where: str, names: list[str]) -> str:
    kind, dim = where.split()
    if kind == "input":
        return f"splits dim {dim} of the inputs" if len(names) > 1 else f"splits dim {dim} of {names[0]}"
    layers = list(dict.fromkeys(_below(name) for name in names))
    listed = ", ".join(layers[:6]) + (", ..." if len(layers) > 6 else "")
    return f"splits dim {dim} of {listed}"


def _below(name: str) -> str:
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else name


def _sent(graph: fx.Graph, mesh: Mesh) -> Mapping[str, Mapping[str, Mapping[str, int]]]:
    """Per axis and phase, how many of which collectives there are."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or "axis" not in node.kwargs or getattr(node.target, "local", True):
            continue
        axis, phase = str(node.kwargs["axis"]), lowered(node).origin.phase or "forward"
        counts = found.setdefault(axis, {}).setdefault(phase, {})
        name = str(node.target.__name__)  # type: ignore[union-attr]
        counts[name] = counts.get(name, 0) + 1
    return found


def _docstring(c: Compilation) -> list[str]:
    memory, schedule = c.schedule.memory, c.schedule
    proof = "planned at other sizes; no bound was proved"
    if c.solution is not None:
        gap = 1.0 - c.solution.lower_bound / c.solution.cost if c.solution.cost else 0.0
        proof = "no plan costs less" if gap < 1e-6 else f"no plan costs less than {1.0 - gap:.1%} of it"
    return [
        *parallelism(c),
        "",
        f"Predicted on {c.options.device.name}: {in_seconds(schedule.seconds)} a step, of which "
        f"{in_seconds(max(schedule.hidden, 0.0))} of collectives are hidden; {memory.summary}. Proof: {proof}.",
        "",
        "Behind a value: its dtype, its global shape, and @ which axes split a dim; +sum@ over which axes a sum is to",
        "come. Behind a collective: what a rank sends, and how long that takes alone. Runs with torch and",
        "shardc.runtime alone.",
    ]


