"""Timeline: when the nodes of a localized graph run, by the cost model.

    s = all_reduce.start(g, axis="dp")    3 seconds alone, overlap 0.5, stall 0
    y = mm(a, b)                          2 seconds alone: 3 seconds, and 2 seconds of the all_reduce are done
    r = wait(s)                           1 second

A rank computes one node after another, and every mesh axis carries one collective after another. A collective takes
`1 - overlap` of the rank's cores. While the rank computes beside it, both take `2 - overlap` times as long; with
several axes, 1 plus the sum of all `1 - overlap`.

While the rank waits, collectives take their time, or that sum of it, if it is more than 1. Every collective that is
started ahead also costs the `stall` of its link.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from shardc.analysis.operands import collective_of, operand_bytes
from shardc.cost.buckets import Buckets
from shardc.cost.conversion import step_seconds
from shardc.cost.hardware import Hardware
from shardc.ir.mesh import Mesh
from shardc.ir.partition import Partition
from shardc.rules.factors.chosen import Chosen, chosen_of
from shardc.rules.factors.factored import Kind
from shardc.rules.factors.strategy import Shape, Strategy, sends, work
from shardc.runtime.collectives.bucket import Bucket
from shardc.runtime.collectives.collective import AnyCollective, wait

Inner = tuple[AnyCollective, str, float, float]
"""A collective inside an operator's body: which, axis, bytes of the local operand, seconds."""
_RESIDUE = 1e-12
"""A difference of seconds that is a smaller part of its terms is a rounding error."""
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
        self._operators: dict[tuple[Kind, Strategy], tuple[float, list[Inner]]] = {}

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

    def operator(self, chosen: Chosen) -> tuple[float, list[Inner]]:
        """Seconds of an operator's compute, and the collectives in its body; computed once per kind and strategy."""
        key = chosen.op.kind, chosen.strategy
        known = self._operators.get(key)
        if known is None:
            inner = [
                (kind, axis, size, step_seconds(kind, axis, size, self.mesh, self.device))
                for kind, axis, size in sends(chosen.shape, chosen.strategy, self.mesh)
            ]
            known = self._operators[key] = self._compute(chosen.shape, chosen.strategy), inner
        return known

    def _compute(self, shape: Shape, strategy: Strategy) -> float:
        if not shape.computes:
            return 0.0
        return self.device.compute_seconds(*work(shape, strategy, self.mesh), shape.dtype)


class Times:
    """What every node takes, computed once: `compute` and `sent` are seconds of compute and of a collective, `inner`
    the collectives in the body of an operator, `operands` what a node reads."""

    def __init__(self, run: Partition, pace: Pace) -> None:
        self.mesh, self.device, self.operands = pace.mesh, pace.device, run.operands
        self.compute: dict[fx.Node, float] = {}
        self.sent: dict[fx.Node, float] = {}
        self.inner: dict[fx.Node, list[Inner]] = {}
        for node in self.operands:
            chosen = chosen_of(node)
            if chosen is None:
                self.compute[node], self.sent[node] = pace.node_seconds(node)
                continue
            self.compute[node], inner = pace.operator(chosen)
            self.sent[node] = 0.0
            if inner:
                self.inner[node] = inner


class Flight(NamedTuple):
    """A collective that was started: its axis, and the seconds of all collectives started there, up to itself."""

    axis: str
    until: float


class Clock:
    """The time of the rank, `now`, in seconds, and how much is left of every collective that was started."""

    def __init__(self, mesh: Mesh, device: Hardware) -> None:
        self.now = 0.0
        self._mesh, self._device = mesh, device
        beside = {axis: device.overlapping(mesh, axis) for axis in mesh.names}
        self._loads = {axis: 1.0 - overlap for axis, (overlap, _) in beside.items()}
        self._stalls = {axis: stall for axis, (_, stall) in beside.items()}
        self._started = dict.fromkeys(mesh.names, 0.0)  # seconds of all collectives of an axis
        self._left: dict[str, float] = {}  # the part of them that has not run yet, for axes that have any

    def hides(self, axis: str, seconds: float) -> bool:
        """Whether computing beside a collective of `seconds` saves time. The collective first waits for those that were
        started on its axis."""
        return self._device.hidden(self._mesh, axis, self._left.get(axis, 0.0) + seconds) > 0.0

    def run(self, axis: str, seconds: float) -> None:
        """A collective runs, and the rank waits for it."""
        self.wait(self._enqueue(axis, seconds))

    def start(self, axis: str, seconds: float) -> Flight:
        """A collective of `seconds` is started; the rank goes on computing."""
        self.compute(self._stalls[axis])
        return self._enqueue(axis, seconds)

    def _enqueue(self, axis: str, seconds: float) -> Flight:
        self._started[axis] += seconds
        self._left[axis] = self._left.get(axis, 0.0) + seconds
        return Flight(axis, self._started[axis])

    def compute(self, seconds: float) -> None:
        """The rank computes what takes `seconds` alone."""
        while self._left and seconds > 0.0:
            step = min(seconds, *self._left.values())
            self._go_on(step, 1.0 + self._load())
            seconds -= step
        self.now += seconds

    def wait(self, flight: Flight) -> None:
        """The rank waits until a collective has ended."""
        while rest := self.rest(flight):
            self._go_on(min(rest, *self._left.values()), max(1.0, self._load()))

    def rest(self, flight: Flight) -> float:
        """The seconds that a collective would still take alone; 0 if it has ended."""
        rest = self._left.get(flight.axis, 0.0) - (self._started[flight.axis] - flight.until)
        return rest if rest > _RESIDUE * self._started[flight.axis] else 0.0

    def beside(self, flight: Flight) -> float:
        """The seconds that a collective still takes if the rank goes on computing."""
        return self.rest(flight) * (1.0 + self._load())

    def _load(self) -> float:
        """The part of the cores that all collectives under way would take together; it may be more than 1."""
        return sum([self._loads[axis] for axis in self._left])

    def _go_on(self, step: float, taking: float) -> None:
        """Every collective under way advances by `step` of its seconds, each of which takes `taking` seconds."""
        self.now += step * taking
        self._left = {axis: left - step for axis, left in self._left.items() if left > step}


def is_started(node: fx.Node) -> bool:
    """Whether a collective is only started, and another node awaits it."""
    return any(user.target is wait for user in node.users)


def timed(order: Order, times: Times) -> tuple[float, float]:
    """The seconds of a run in this order, and the seconds of collectives during which the rank computes."""
    clock, flights, total = Clock(times.mesh, times.device), dict[fx.Node, Flight](), 0.0
    started = {node for node, awaited in order if awaited}
    for node, awaited in order:
        if awaited:
            clock.wait(flights[node])
            continue
        compute, seconds, inner = times.compute[node], times.sent[node], times.inner.get(node, ())
        clock.compute(compute)
        total += compute + seconds + sum(inner_seconds for *_, inner_seconds in inner)
        for _, axis, _, inner_seconds in inner:
            clock.run(axis, inner_seconds)
        if seconds and node in started:
            flights[node] = clock.start(str(node.kwargs["axis"]), seconds)
        elif seconds:
            clock.run(str(node.kwargs["axis"]), seconds)
    gained = total - clock.now
    return clock.now, gained if abs(gained) > _RESIDUE * total else 0.0
