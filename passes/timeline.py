"""Timeline: when the nodes of a localized graph run, as the cost model has it.

A rank computes one thing after another, and every mesh axis carries one collective after another. A collective of s
seconds keeps the rank's own cores busy for `(1 - overlap) s`; for the rest of its time, from when its axis is free, the
rank computes what comes next, if the collective was only started, and waits if it was called:

    s = all_reduce.start(g, axis="dp")    the rank: (1 - overlap) s;  dp: busy for overlap * s
    y = mm(a, b)                          the rank: the seconds of the product
    r = wait(s)                           the rank: until dp is done with it
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

from torch import fx

from shardc.cost.buckets import Buckets
from shardc.cost.conversion import LOCAL, step_seconds
from shardc.cost.hardware import Hardware
from shardc.mesh import Mesh
from shardc.passes.bucket import BUCKETS, COLLECTIVES, operand_bytes
from shardc.rules.factoring import Op
from shardc.runtime.started import wait
from shardc.solver.network import Network
from shardc.solver.strategies import sends


class Pace:
    """How long the nodes of a localized graph take, one by one."""

    def __init__(self, network: Network, device: Hardware) -> None:
        self.network, self.mesh, self.device = network, network.mesh, device
        self.buckets = Buckets(network.mesh, device)
        self._operators: dict[fx.Node, float] = {}

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

    def compute(self, node: fx.Node) -> float:
        """Seconds that a rank computes: in an operator, its body's collectives apart, or in a step that sends
        nothing; in a bucket, those that it takes to fill it."""
        if "op" in node.meta:
            if node not in self._operators:
                strategy = node.meta["strategy"]
                self._operators[node] = self.network.options_of(node.meta["op"]).compute_of(strategy)
            return self._operators[node]
        step = self.step(node)
        if step is None:
            return 0.0
        return step[2] if step[0] in LOCAL else step[2] - self.sent(node)

    def sent(self, node: fx.Node) -> float:
        """Seconds of a collective of the graph; 0 for other nodes."""
        step = self.step(node)
        if step is None or step[0] in LOCAL or self.mesh.sizes[str(node.kwargs["axis"])] == 1:
            return 0.0
        return self.buckets.alone(step[0], str(node.kwargs["axis"]), step[1])

    def inner(self, node: fx.Node) -> list[tuple[str, str, float, float]]:
        """The collectives inside an operator's body: kind, axis, bytes of the local operand, seconds."""
        if "op" not in node.meta:
            return []
        op: Op = node.meta["op"]
        found = sends(self.network.options_of(op).shape, node.meta["strategy"], self.mesh)
        return [(k, axis, size, step_seconds(k, axis, size, self.mesh, self.device)) for k, axis, size in found]


class Clock:
    """What time it is for the rank, `now`, and until when every axis is busy. In seconds."""

    def __init__(self, mesh: Mesh, device: Hardware) -> None:
        self.mesh, self.device = mesh, device
        self.now = 0.0
        self.busy: dict[str, float] = defaultdict(float)

    def start(self, axis: str, seconds: float) -> float:
        """A collective of so many seconds is started; when it will have ended."""
        beneath = self.shares[axis] * seconds
        self.now += seconds - beneath
        self.busy[axis] = max(self.now, self.busy[axis]) + beneath
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


def hidden(nodes: Sequence[fx.Node], pace: Pace) -> float:
    """The seconds of collectives that nobody waits for when nodes run in this order."""
    clock, ends, total = Clock(pace.mesh, pace.device), dict[fx.Node, float](), 0.0
    for node in nodes:
        if node.target is wait:
            clock.wait(ends[node.all_input_nodes[0]])
            continue
        seconds, inner = pace.sent(node), pace.inner(node)
        clock.now += pace.compute(node)
        total += pace.compute(node) + seconds + sum(own for *_, own in inner)
        for _, axis, _, own in inner:
            clock.wait(clock.start(axis, own))
        if seconds:
            ends[node] = clock.start(str(node.kwargs["axis"]), seconds)
            if not is_started(node):
                clock.wait(ends[node])
    return total - clock.now
