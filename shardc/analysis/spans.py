"""Spans: what the rank does, and what every mesh axis carries, from when to when.

order = [(%r, False), (%y, False), (%r, True)]     start all_reduce over dp, compute %y, await
compute   start [0, 0]      %y [0, 3]       wait for %r [3, 4]
dp        %r [0, 4]
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from typing import NamedTuple

from torch import fx

from shardc.analysis.timeline import Order, Times, run_on, started_in
from shardc.cost.clock import Clock, Flight
from shardc.cost.hardware import Hardware
from shardc.ir.mesh import Mesh

COMPUTE = "compute"
_CLOSE = 1e-9
"""A collective of which a smaller part is left has ended."""


class Span(NamedTuple):
    """What a track does from `start` to `end`, in seconds: the rank itself (`compute`, where it may also wait for a
    collective), or a mesh axis."""

    node: fx.Node
    track: str
    start: float
    end: float
    waits: bool = False


class _Queued(NamedTuple):
    node: fx.Node
    since: float
    until: float
    """Seconds of all collectives started on the axis, up to this one."""


class _RecordingClock(Clock):
    """A clock that writes down when collectives run: on an axis one after another."""

    def __init__(self, mesh: Mesh, device: Hardware) -> None:
        super().__init__(mesh, device)
        self.spans: list[Span] = []
        self._queues: dict[str, deque[_Queued]] = defaultdict(deque)
        self._free: dict[str, float] = defaultdict(float)
        self.node: fx.Node | None = None

    def _enqueue(self, axis: str, seconds: float) -> Flight:
        flight = super()._enqueue(axis, seconds)
        assert self.node is not None
        if seconds:
            self._queues[axis].append(_Queued(self.node, self.now, flight.until))
        return flight

    def _go_on(self, step: float, taking: float) -> None:
        for axis, left in self._left.items():
            done, queue = self._started[axis] - left, self._queues[axis]
            while queue and queue[0].until <= (done + step) * (1.0 + _CLOSE):
                self._end(axis, self.now + max(0.0, queue[0].until - done) * taking)
        super()._go_on(step, taking)

    def _end(self, axis: str, now: float) -> None:
        one = self._queues[axis].popleft()
        self.spans.append(Span(one.node, axis, max(one.since, self._free[axis]), now))
        self._free[axis] = now

    def finish(self) -> None:
        """What is still under way ends now."""
        for axis, queue in self._queues.items():
            while queue:
                self._end(axis, self.now)


def spans(order: Order, times: Times) -> list[Span]:
    """What happens when nodes run in this order. Those of the rank follow each other without a gap, up to the seconds
    of `timed`."""
    clock, before, found = _RecordingClock(times.mesh, times.device), 0.0, list[Span]()

    def told() -> Iterator[tuple[fx.Node, bool]]:
        for clock.node, awaited in order:
            yield clock.node, awaited

    for node, awaited in run_on(clock, told(), started_in(order), times):
        if clock.now > before:
            found.append(Span(node, COMPUTE, before, clock.now, awaited or times.sent[node] > 0.0))
        before = clock.now
    clock.finish()
    return [*found, *clock.spans]
