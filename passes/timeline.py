"""Timeline: when the nodes of a localized graph run, as the cost model has it.

A rank computes one thing after another, and every mesh axis carries one collective after another. A collective of s
seconds keeps its axis busy for all of them, from when that is free, and the rank's own cores for `(1 - overlap) s`. For
the rest of the time the rank computes what comes next, if the collective was only started, and waits if it was called:

    s = all_reduce.start(g, axis="dp")    the rank: (1 - overlap) s;  dp: busy for s
    y = mm(a, b)                          the rank: the seconds of the product
    r = wait(s)                           the rank: until dp is done with it
"""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property

from torch import fx

from shardc.cost.buckets import Buckets
from shardc.cost.conversion import LOCAL, step_seconds
from shardc.cost.hardware import Hardware
from shardc.halves import Halves
from shardc.mesh import Mesh
from shardc.passes.bucket import BUCKETS, COLLECTIVES, operand_bytes
from shardc.rules.factored import Kind
from shardc.runtime.started import wait
from shardc.solver.network import Network
from shardc.solver.strategies import Strategy, sends

Inner = tuple[str, str, float, float]
"""A collective inside an operator's body: kind, axis, bytes of the local operand, seconds."""
Order = list[tuple[fx.Node, bool]]
"""Nodes as they run; with True, where a collective is awaited that was only started."""


class Pace:
    """How long the nodes of a localized graph take, one by one."""

    def __init__(self, network: Network, device: Hardware) -> None:
        self.network, self.mesh, self.device = network, network.mesh, device
        self.buckets = Buckets(network.mesh, device)
        self._operators: dict[tuple[Kind, Strategy], tuple[float, list[Inner]]] = {}

    def step(self, node: fx.Node) -> tuple[str, float, float] | None:
        """The kind of a conversion's step, the bytes of its local operand and its seconds; None for other nodes."""
        kind = COLLECTIVES.get(node.target)
        if kind is None:
            return None
        axis, moved = str(node.kwargs["axis"]), float(sum(operand_bytes(node, self.mesh)))
        if node.target in BUCKETS:
            return kind, moved, self.buckets.seconds(kind, axis, moved)
        part = moved / self.mesh.sizes[axis] if kind == "shard" else moved
        return kind, moved, step_seconds(kind, axis, part, self.mesh, self.device)

    def taken(self, node: fx.Node) -> tuple[float, float]:
        """Seconds of a node that is no operator: those that a rank computes, in a step that sends nothing, or to fill a
        bucket; and those of a collective."""
        step = self.step(node)
        if step is None:
            return 0.0, 0.0
        (kind, moved, seconds), axis = step, str(node.kwargs["axis"])
        if kind in LOCAL:
            return seconds, 0.0
        sent = 0.0 if self.mesh.sizes[axis] == 1 else self.buckets.alone(kind, axis, moved)
        return seconds - sent, sent

    def operator(self, node: fx.Node) -> tuple[float, list[Inner]]:
        """Seconds of an operator's compute, and what its body sends; reckoned once per form."""
        key = node.meta["op"].kind, node.meta["strategy"]
        found = self._operators.get(key)
        if found is None:
            options, strategy = self.network.options_of(node.meta["op"]), key[1]
            inner = [
                (kind, axis, size, step_seconds(kind, axis, size, self.mesh, self.device))
                for kind, axis, size in sends(options.shape, strategy, self.mesh)
            ]
            found = self._operators[key] = options.compute_of(strategy), inner
        return found


class Times:
    """What nodes take, each reckoned once: `compute` and `sent` in seconds, where an operator's body sends what is
    `inner`; and the `operands` of each."""

    def __init__(self, run: Halves, pace: Pace) -> None:
        self.mesh, self.device, self.operands = pace.mesh, pace.device, run.operands
        self.compute: dict[fx.Node, float] = {}
        self.sent: dict[fx.Node, float] = {}
        self.inner: dict[fx.Node, list[Inner]] = {}
        for node in self.operands:
            if "op" not in node.meta:
                self.compute[node], self.sent[node] = pace.taken(node)
                continue
            self.compute[node], inner = pace.operator(node)
            self.sent[node] = 0.0
            if inner:
                self.inner[node] = inner


class Clock:
    """What time it is for the rank, `now`, and until when every axis is busy. In seconds."""

    def __init__(self, mesh: Mesh, device: Hardware) -> None:
        self.mesh, self.device = mesh, device
        self.now = 0.0
        self.busy: dict[str, float] = defaultdict(float)

    def start(self, axis: str, seconds: float) -> float:
        """A collective of so many seconds is started; when it will have ended. What it takes of the rank's own cores
        counts from now, even where its axis is not free yet."""
        self.busy[axis] = max(self.now, self.busy[axis]) + seconds
        self.now += (1 - self.shares[axis]) * seconds
        return self.busy[axis]

    def wait(self, end: float) -> None:
        """Nothing is computed before `end`."""
        self.now = max(self.now, end)

    @cached_property
    def shares(self) -> dict[str, float]:
        return {axis: self.device.overlap(self.mesh, axis) for axis in self.mesh.names}


def is_started(node: fx.Node) -> bool:
    """Whether a collective is started only, and awaited by another node."""
    return any(user.target is wait for user in node.users)


def hidden(order: Order, times: Times) -> float:
    """The seconds of collectives that nobody waits for when nodes run in this order."""
    clock, ends, total = Clock(times.mesh, times.device), dict[fx.Node, float](), 0.0
    started = {node for node, awaited in order if awaited}
    for node, awaited in order:
        if awaited:
            clock.wait(ends[node])
            continue
        compute, seconds, inner = times.compute[node], times.sent[node], times.inner.get(node, ())
        clock.now += compute
        total += compute + seconds + sum(own for *_, own in inner)
        for _, axis, _, own in inner:
            clock.wait(clock.start(axis, own))
        if seconds:
            ends[node] = clock.start(str(node.kwargs["axis"]), seconds)
            if node not in started:
                clock.wait(ends[node])
    return total - clock.now
