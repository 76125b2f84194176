"""Arrange: buckets and overlap, as many of both as memory has room for.

Buckets are written into the graph at once. What overlaps is decided on a list of nodes, of which it is known what they
hold and what they hide; the list that fits is written, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import fx

from shardc.analysis.memory import Memory, MemoryAnalysis
from shardc.analysis.timeline import Order, Pace, Times, timed
from shardc.cost.buckets import Buckets
from shardc.cost.memory import States
from shardc.ir.mesh import Mesh
from shardc.ir.partition import Partition, partition
from shardc.ir.program import Program
from shardc.passes.bucket import Joined, becoming_gradients, bucket, made_at
from shardc.passes.overlap import overlap, rewrite

MODEST = (
    (1.0, ("all", "gradients", "nothing")), *((1 / k, ("nothing",)) for k in (2, 4, 16, 64)), (0.0, ("nothing",)),
)  # fmt: skip
"""What is tried until the generated code fits into memory: how large buckets are, as part of what the link would have,
and with them which collectives overlap."""


AT_STAKE = 0.01
"""What part of backward has to lie in collectives that wait for a bucket before it is tried without such buckets."""


@dataclass(frozen=True)
class Schedule:
    """A graph and the order in which it is to run; what makes it anew as it was before overlap, and whether its buckets
    left those `apart` that would hold back others; what it holds in that order, the seconds that it takes, and those of
    its collectives that nobody waits for."""

    graph: fx.Graph
    bucketed: Callable[[], fx.Graph]
    apart: bool
    order: Order
    memory: Memory
    seconds: float
    hidden: float


def schedule(
    graph: fx.Graph, again: Callable[[], fx.Graph], program: Program, pace: Pace, states: States, budget: float | None
) -> Schedule:
    """Arrange the collectives of a localized graph, which is changed, so that it holds at most `budget` bytes. `again`
    makes the graph anew, for other buckets. Raises AssertionError where nothing fits."""
    arranger = _Scheduler(again, program, pace, states, math.inf if budget is None else budget)
    largest = math.inf
    for part, ways in MODEST:
        if part < 1.0 and not largest:
            break
        most = part * largest
        found, joined, beneath = arranger.ordered(graph if part == 1.0 else again(), most, False, ways)
        largest = min(largest, joined.largest) if part == 1.0 else largest
        if joined.held > AT_STAKE * beneath:
            other = arranger.ordered(again(), most, True, ways)[0]
            found = min((one for one in (found, other) if one), key=lambda one: one.seconds, default=None)
        if found:
            rewrite(found.graph, found.order)
            return found
    raise AssertionError(f"the plan was to hold {arranger.budget:.0f} bytes, its code holds {arranger.least:.0f}")


@dataclass
class _Scheduler:
    """Orders the graphs of one plan; `least` is what the smallest so far would hold."""

    again: Callable[[], fx.Graph]
    program: Program
    pace: Pace
    states: States
    budget: float
    least: float = math.inf

    def ordered(
        self, graph: fx.Graph, most: float, apart: bool, ways: Sequence[str]
    ) -> tuple[Schedule | None, Joined, float]:
        """The first of `ways` to overlap that fits and hides more than it stalls; what the buckets are, and the seconds
        that backward computes."""
        run, pace = partition(graph, self.program), self.pace
        bucketed, joined = self.again, Joined(0, run, 0.0)
        if most:
            buckets = Buckets(pace.mesh, pace.device, most)
            bucketed, joined = partial(self.bucketed, buckets, apart), bucket(graph, run, buckets, apart)
        run = joined.run
        ready, times = made_at(graph, becoming_gradients(run, graph)), Times(run, pace)
        footprint = MemoryAnalysis(graph, run, self.program, pace.mesh, self.states)
        beneath = sum([times.compute[node] for node in run.backward])
        for what in ways:
            halved = _in_order(run) if what == "nothing" else overlap(run, ready, times, fetch=what == "all")
            memory, order = footprint.memory(*halved), [*halved[0], *halved[1]]
            self.least = min(self.least, memory.peak)
            if memory.peak <= self.budget:
                found = Schedule(graph, bucketed, apart, order, memory, *timed(order, times))
                if what == "nothing" or found.hidden >= 0.0:  # what is started may stall more than it hides
                    return found, joined, beneath
        return None, joined, beneath

    def bucketed(self, buckets: Buckets, apart: bool) -> fx.Graph:
        graph = self.again()
        bucket(graph, partition(graph, self.program), buckets, apart)
        return graph


def smallest(graph: fx.Graph, program: Program, mesh: Mesh, states: States) -> float:
    """The bytes that a localized graph holds at most without buckets and overlap."""
    run = partition(graph, program)
    return MemoryAnalysis(graph, run, program, mesh, states).memory(*_in_order(run)).peak


def _in_order(run: Partition) -> tuple[Order, Order]:
    return [(node, False) for node in run.forward], [(node, False) for node in run.backward]
