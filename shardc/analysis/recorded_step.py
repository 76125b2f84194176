"""A step of the generated code, recorded: what the rank does, what every mesh axis carries, and what is held meanwhile.

    order = [(%r, False), (%y, False), (%r, True)]     start all_reduce over dp, compute %y, await
    Span(%y, COMPUTE, 0.0, 3.0)
    Span(%r, COMPUTE, 3.0, 4.0, waits=True)
    Span(%r, "dp", 0.0, 4.0)

The clock is that of the timeline, and the bytes are those of the memory analysis: both are asked once more, in the
order that the schedule chose.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from shardc.analysis.memory import MemoryAnalysis
from shardc.analysis.operands import collective_of
from shardc.analysis.recorded_memory import Moment, peak_by_module, recorded_memory
from shardc.analysis.timeline import Order, Times, run_on, started_in
from shardc.cost.clock import Clock, Flight
from shardc.cost.hardware import Hardware
from shardc.ir.mesh import Mesh
from shardc.ir.program import name_of

COMPUTE = ""
"""The track of the rank itself; no mesh axis is called so."""

_CLOSE = 1e-9
"""A collective of which a smaller part is left has ended."""


class Span(NamedTuple):
    """What a track does from `start` to `end`, in seconds: a mesh axis carries the collective of `node`, or the rank
    itself (`COMPUTE`) computes, or `waits` for what it sends."""

    node: fx.Node
    track: str
    start: float
    end: float
    waits: bool = False

    @property
    def name(self) -> str:
        """The operator or collective; `prepare all_reduce` where the rank fills a bucket, or stalls at a start."""
        collective = collective_of(self.node)
        if collective is None:
            return f"wait in {name_of(self.node.target)}" if self.waits else name_of(self.node.target)
        if self.track != COMPUTE or collective.single.local:
            return collective.name
        return f"{'wait for' if self.waits else 'prepare'} {collective.name}"


@dataclass(frozen=True)
class RecordedStep:
    """`seconds` is the time of the step. The spans of one track follow each other; those of the rank leave no gap.
    `moments` has one entry for every entry of the order, and `starts` when each begins. `peak_by_module` says in which
    modules the bytes of the peak were made."""

    seconds: float
    spans: tuple[Span, ...]
    starts: tuple[float, ...]
    moments: tuple[Moment, ...]
    peak_by_module: Mapping[str, float]


def recorded_step(forward: Order, backward: Order, times: Times, memory: MemoryAnalysis) -> RecordedStep:
    """Record a step in which forward and backward run in these orders."""
    order = [*forward, *backward]
    clock, starts = _RecordingClock(times.mesh, times.device), list[float]()

    def told() -> Iterator[tuple[fx.Node, bool]]:
        for node, awaited in order:
            clock.node = node
            starts.append(clock.now)
            yield node, awaited

    deque(run_on(clock, told(), started_in(order), times), maxlen=0)
    clock.finish()
    spans = sorted(clock.spans, key=lambda span: (span.start, span.track))
    held = recorded_memory(memory, forward, backward)
    by_module = peak_by_module(memory, forward, backward, held.peak)
    return RecordedStep(clock.now, tuple(spans), tuple(starts), held.moments, by_module)


class _Queued(NamedTuple):
    node: fx.Node
    since: float
    until: float
    """Seconds of all collectives started on the axis, up to this one."""


class _RecordingClock(Clock):
    """A clock that writes down what `node` makes the rank do, and when collectives run, on an axis one by one."""

    def __init__(self, mesh: Mesh, device: Hardware) -> None:
        super().__init__(mesh, device)
        self.spans: list[Span] = []
        self.node: fx.Node | None = None
        self._queues: dict[str, deque[_Queued]] = defaultdict(deque)
        self._free: dict[str, float] = defaultdict(float)  # since when the links of an axis carry nothing else

    def compute(self, seconds: float) -> None:
        before = self.now
        super().compute(seconds)
        self._add(before, waits=False)

    def wait(self, flight: Flight) -> None:
        before = self.now
        super().wait(flight)
        self._add(before, waits=True)

    def _add(self, before: float, *, waits: bool) -> None:
        assert self.node is not None
        if self.now > before:
            self.spans.append(Span(self.node, COMPUTE, before, self.now, waits))

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
                self._end(axis, self.now + min(max(0.0, queue[0].until - done), step) * taking)
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
