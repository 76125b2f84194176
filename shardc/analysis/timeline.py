"""Timeline: when the nodes of a localized graph run, by the cost model.

    s = all_reduce.start(g, axis="dp")    3 seconds alone, overlap 0.5, stall 0
    y = mm(a, b)                          2 seconds alone: 3 seconds, and 2 seconds of the all_reduce are done
    r = wait(s)                           1 second

`shardc/cost/clock.py` has the model: how what is computed and what is sent at one time slow each other down.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import fx

from shardc.analysis.bodies import Body, body_of
from shardc.analysis.operands import collective_of, operand_bytes
from shardc.cost.buckets import Buckets
from shardc.cost.clock import Clock, Flight, rounded
from shardc.cost.conversion import step_seconds
from shardc.cost.hardware import Hardware
from shardc.ir.mesh import Mesh
from shardc.ir.partition import Partition
from shardc.rules.factors.chosen import Chosen, chosen_of
from shardc.rules.factors.factored import Kind
from shardc.rules.factors.strategy import Strategy
from shardc.runtime.collectives.bucket import Bucket
from shardc.runtime.collectives.collective import AnyCollective, wait

Order = list[tuple[fx.Node, bool]]
"""Nodes as they run. An entry with True awaits the collective that an earlier entry started."""


def in_order(run: Partition) -> tuple[Order, Order]:
    """Forward and backward as they are written; every collective is awaited at once."""
    return [(node, False) for node in run.forward], [(node, False) for node in run.backward]


class Pace:
    """How long the nodes of a localized graph take, each alone, in seconds."""

    def __init__(self, mesh: Mesh, device: Hardware) -> None:
        self.mesh, self.device = mesh, device
        self.buckets = Buckets(mesh, device)
        self._operators: dict[tuple[Kind, Strategy], Body] = {}

    def step(self, node: fx.Node) -> tuple[AnyCollective, float, float] | None:
        """The collective of a conversion, the bytes of its local operand and its seconds; None for other nodes."""
        collective = collective_of(node)
        if collective is None:
            return None
        kind = collective.single
        axis, moved = str(node.kwargs["axis"]), float(sum(operand_bytes(node, self.mesh)))
        if isinstance(collective, Bucket):
            return kind, moved, self.buckets.seconds(kind, axis, moved)
        part = moved / self.mesh.sizes[axis] if kind.keeps_part else moved
        folded = any(name.endswith("order") for name in node.kwargs)
        return kind, moved, step_seconds(kind, axis, part, self.mesh, self.device, folded)

    def node_seconds(self, node: fx.Node) -> tuple[float, float]:
        """Seconds of a node that is no operator: those that the rank computes (in a step that sends nothing, or to
        fill a bucket), and those of a collective."""
        step = self.step(node)
        if step is None:
            return 0.0, 0.0
        (kind, moved, seconds), axis = step, str(node.kwargs["axis"])
        if kind.local:
            return seconds, 0.0
        sent = 0.0 if self.mesh.sizes[axis] == 1 else self.buckets.alone(kind, axis, moved)
        return seconds - sent, sent

    def operator(self, chosen: Chosen) -> Body:
        """What runs for an operator; computed once per kind and strategy."""
        key = chosen.op.kind, chosen.strategy
        if key not in self._operators:
            self._operators[key] = body_of(chosen.shape, chosen.strategy, self.mesh, self.device)
        return self._operators[key]


class Times:
    """What every node takes, computed once: `compute` and `sent` are seconds of compute and of a collective, `bodies`
    what runs for operators that send, `operands` what a node reads."""

    def __init__(self, run: Partition, pace: Pace) -> None:
        self.mesh, self.device, self.operands = pace.mesh, pace.device, run.operands
        self.compute: dict[fx.Node, float] = {}
        self.sent: dict[fx.Node, float] = {}
        self.bodies: dict[fx.Node, Body] = {}
        for node in self.operands:
            chosen = chosen_of(node)
            if chosen is None:
                self.compute[node], self.sent[node] = pace.node_seconds(node)
                continue
            body = pace.operator(chosen)
            self.compute[node], self.sent[node] = body.compute, 0.0
            if body.sent:
                self.bodies[node] = body

    def run(self, node: fx.Node, clock: Clock) -> None:
        """The rank computes a node, and an operator's body sends what it sends."""
        if node not in self.bodies:
            clock.compute(self.compute[node])
            return
        for step in self.bodies[node].steps:
            clock.step(step)


def is_started(node: fx.Node) -> bool:
    """Whether a collective is only started, and another node awaits it."""
    return any(user.target is wait for user in node.users)


def timed(order: Order, times: Times) -> tuple[float, float, Mapping[str, float]]:
    """The seconds of a run in this order, the seconds of collectives during which the rank computes, and by axis the
    seconds that the rank loses on account of it."""
    clock, total = Clock(times.mesh, times.device), 0.0
    for node, awaited in run_on(clock, order, started_in(order), times):
        if not awaited:
            sending = times.bodies[node].sending if node in times.bodies else 0.0
            total += times.compute[node] + times.sent[node] + sending
    return clock.now, rounded(total - clock.now, total), clock.lost


def started_in(order: Order) -> set[fx.Node]:
    """The collectives that are started ahead, and awaited by a later entry."""
    return {node for node, awaited in order if awaited}


def run_on(
    clock: Clock, order: Iterable[tuple[fx.Node, bool]], started: Collection[fx.Node], times: Times
) -> Iterator[tuple[fx.Node, bool]]:
    """Run nodes in this order on a clock; each comes right after it ran."""
    flights = dict[fx.Node, Flight]()
    for node, awaited in order:
        if awaited:
            clock.wait(flights[node])
        else:
            seconds = times.sent[node]
            times.run(node, clock)
            if seconds and node in started:
                flights[node] = clock.start(str(node.kwargs["axis"]), seconds)
            elif seconds:
                clock.run(str(node.kwargs["axis"]), seconds)
        yield node, awaited
