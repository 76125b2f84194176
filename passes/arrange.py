"""Arrange: buckets and overlap, as many of both as memory has room for.

Buckets are written into the graph at once. What overlaps is decided on a list of nodes, of which it is known what they
hold and what they hide; the list that fits is written, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import fx

from shardc.cost.buckets import Buckets
from shardc.cost.memory import States
from shardc.graph import Program
from shardc.halves import Halves, halves
from shardc.mesh import Mesh
from shardc.passes.bucket import becoming_gradients, bucket, made_at
from shardc.passes.footprint import Footprint
from shardc.passes.overlap import overlap, rewrite
from shardc.passes.timeline import Order, Pace, Times, hidden
from shardc.plan import Memory

MODEST = (
    (1.0, ("all", "gradients", "nothing")), *((1 / k, ("nothing",)) for k in (2, 4, 16, 64)), (0.0, ("nothing",)),
)  # fmt: skip
"""What is tried until the generated code fits into memory: how large buckets are, as part of what the link would have,
and with them which collectives overlap."""


@dataclass(frozen=True)
class Arranged:
    """The graph as it will run, what makes it anew as it was before overlap, what it holds, and the seconds of its
    collectives that nobody waits for."""

    graph: fx.Graph
    bucketed: Callable[[], fx.Graph]
    memory: Memory
    hidden: float


def arrange(
    graph: fx.Graph, again: Callable[[], fx.Graph], program: Program, pace: Pace, states: States, budget: float | None
) -> Arranged:
    """Arrange the collectives of a localized graph, which is changed, so that it holds at most `budget` bytes. `again`
    makes the graph anew, for other buckets. Raises AssertionError where nothing fits."""
    mesh, run = pace.mesh, halves(graph, program)
    largest, least = math.inf, math.inf

    def bucketed(buckets: Buckets | None) -> fx.Graph:
        graph = again()
        if buckets is not None:
            bucket(graph, halves(graph, program), buckets)
        return graph

    for part, ways in MODEST:
        if part < 1.0:
            if not largest:
                break
            graph = again()
            run = halves(graph, program)
        buckets = Buckets(mesh, pace.device, part * largest) if part else None
        if buckets is not None:
            made, run = bucket(graph, run, buckets)
            largest = min(largest, made) if part == 1.0 else largest
        ready = made_at(graph, becoming_gradients(run, graph))
        times, footprint = Times(run, pace), Footprint(graph, run, program, mesh, states)
        for what in ways:
            forward, backward = _in_order(run) if what == "nothing" else overlap(run, ready, times, fetch=what == "all")
            memory = footprint.memory(forward, backward)
            least = min(least, memory.peak)
            if budget is None or memory.peak <= budget:
                order = [*forward, *backward]
                rewrite(graph, order)
                return Arranged(graph, partial(bucketed, buckets), memory, hidden(order, times))
    raise AssertionError(f"the plan was to hold {budget:.0f} bytes, its code holds {least:.0f}")


def smallest(graph: fx.Graph, program: Program, mesh: Mesh, states: States) -> float:
    """The bytes that a localized graph holds at most without buckets and overlap."""
    run = halves(graph, program)
    return Footprint(graph, run, program, mesh, states).memory(*_in_order(run)).peak


def _in_order(run: Halves) -> tuple[Order, Order]:
    return [(node, False) for node in run.forward], [(node, False) for node in run.backward]
