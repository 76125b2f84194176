"""A step of the generated code, recorded: when every call and collective runs, and what is held meanwhile.

    Span("mm", "layers.0.up", "", 0.0, 2.0)             lane "": the rank computes
    Span("all_reduce", "layers.1.up", "dp", 0.5, 3.5)   lane "dp": the links of that axis carry it

The clock is that of the timeline, and the bytes are those of the memory analysis: both are asked once more, in the
order that the schedule chose.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from shardc.analysis.memory import Execution, MemoryAnalysis
from shardc.analysis.operands import collective_of
from shardc.analysis.timeline import Order, Times
from shardc.cost.clock import Clock, Flight
from shardc.ir.facts import dtype_of, origin_of
from shardc.ir.program import name_of


class Span(NamedTuple):
    """What runs from `start` to `end`, in seconds: `name` in `module`, on the `lane` of a mesh axis, or on the rank's
    own (`""`). `phase` is forward or backward."""

    name: str
    module: str
    phase: str
    lane: str
    start: float
    end: float


class Moment(NamedTuple):
    """What a rank holds while one call runs, in bytes by label; `at` seconds from the start of the step."""

    at: float
    name: str
    module: str
    phase: str
    held: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.held.values())


@dataclass(frozen=True)
class RecordedStep:
    """`seconds` is the time of the step. `moments` has one entry a call. `peak_by_module` says in which modules the
    bytes of the peak were made: parameters by the module that has them."""

    seconds: float
    spans: tuple[Span, ...]
    moments: tuple[Moment, ...]
    peak_by_module: Mapping[str, float]


def recorded_step(forward: Order, backward: Order, times: Times, memory: MemoryAnalysis) -> RecordedStep:
    """Record a step in which forward and backward run in these orders."""
    order = [*forward, *backward]
    clock, starts = _RecordingClock(times, {node for node, awaited in order if awaited}), list[float]()
    for node, awaited in order:
        starts.append(clock.now)
        clock.run_entry(node, awaited)
    held = _RecordedExecution(memory, memory.memory(forward, backward).peak)
    held.memory(forward, backward)
    moments = [
        Moment(at, name_of(node.target), origin_of(node).module, phase, parts)
        for at, (phase, node, parts) in zip(starts, held.moments, strict=True)
    ]
    spans = sorted(clock.spans, key=lambda span: (span.start, span.lane))
    return RecordedStep(clock.now, tuple(spans), tuple(moments), held.by_module)


class _RecordingClock(Clock):
    """The clock of a step, which notes what runs from when to when."""

    def __init__(self, times: Times, started: set[fx.Node]) -> None:
        super().__init__(times.mesh, times.device)
        self.spans: list[Span] = []
        self._times, self._awaited_later = times, started
        self._flights: dict[fx.Node, Flight] = {}
        self._queues: dict[str, deque[tuple[Flight, fx.Node]]] = {axis: deque() for axis in times.mesh.names}
        self._free = dict.fromkeys(times.mesh.names, 0.0)  # since when the links of an axis carry nothing else
        self._node: fx.Node | None = None

    def run_entry(self, node: fx.Node, awaited: bool) -> None:
        """One entry of the order."""
        if awaited:
            self.wait(self._flights[node])
            return
        self._node, seconds = node, self._times.sent[node]
        self._times.run(node, self)
        if seconds and node in self._awaited_later:
            self._flights[node] = self.start(str(node.kwargs["axis"]), seconds)
        elif seconds:
            self.run(str(node.kwargs["axis"]), seconds)

    def compute(self, seconds: float) -> None:
        before = self.now
        super().compute(seconds)
        if self.now > before and self._node is not None:
            self.spans.append(self._span(self._node, "", before, self.now))

    def _enqueue(self, axis: str, seconds: float) -> Flight:
        flight = super()._enqueue(axis, seconds)
        assert self._node is not None
        if not self._queues[axis]:
            self._free[axis] = self.now
        self._queues[axis].append((flight, self._node))
        return flight

    def _go_on(self, step: float, taking: float) -> None:
        done = {axis: self._done(axis) for axis in self._left}
        before = self.now
        super()._go_on(step, taking)
        for axis, at_first in done.items():
            queue, now = self._queues[axis], self._done(axis)
            while queue and (axis not in self._left or queue[0][0].until <= now):
                flight, node = queue.popleft()
                end = min(before + max(flight.until - at_first, 0.0) * taking, self.now)
                self.spans.append(self._span(node, axis, self._free[axis], end))
                self._free[axis] = end

    def _done(self, axis: str) -> float:
        return self._started[axis] - self._left.get(axis, 0.0)

    def _span(self, node: fx.Node, lane: str, start: float, end: float) -> Span:
        origin, collective = origin_of(node), collective_of(node)
        name = name_of(node.target) if collective is None else collective.name
        if collective is not None and not lane and not collective.single.local:
            name = f"prepare {name}"  # what the rank does for it: it fills a bucket, or stalls where it starts
        return Span(name, origin.module, origin.phase, lane, start, end)


class _RecordedExecution(Execution):
    """A run that notes what is held at every call, and at the peak in which modules that was made."""

    def __init__(self, known: MemoryAnalysis, peak: float) -> None:
        super().__init__(known)
        self.moments: list[tuple[str, fx.Node, Mapping[str, float]]] = []
        self.by_module: dict[str, float] = {}
        self._makers: list[fx.Node] = []  # of every storage
        self._goal = peak

    def _place(self, node: fx.Node, label: str) -> None:
        super()._place(node, label)
        self._made(node)

    def noted(self, phase: str, node: fx.Node, workspace: int) -> None:
        self._made(node)
        super().noted(phase, node, workspace)
        self.moments.append((phase, node, self.parts(workspace)))
        if not self.by_module and self.total + workspace >= self._goal:
            self._attribute(node, workspace)

    def _made(self, node: fx.Node) -> None:
        """The storages that nobody made so far are this node's."""
        self._makers += [node] * (len(self.sizes) - len(self._makers))

    def _attribute(self, node: fx.Node, workspace: int) -> None:
        by_module: Counter[str] = Counter()
        for storage, maker in enumerate(self._makers):
            if self.references[storage]:
                by_module[self._module(maker)] += self.sizes[storage]
        for trained in self.known.trained:
            size = dtype_of(trained).itemsize
            by_module[self._module(trained)] += int(self._bytes_of(trained) / size * self.known.states(size))
        by_module[self._module(node)] += workspace
        self.by_module = {module: float(held) for module, held in by_module.items() if held}

    def _bytes_of(self, node: fx.Node) -> int:
        stored = self.tensors[node][0]
        assert stored is not None
        return self.sizes[stored.storage]

    def _module(self, node: fx.Node) -> str:
        return origin_of(node).module or self.known.names.get(node, "").rpartition(".")[0]
