"""Schedule: how large buckets are and which collectives run beside compute, as much of both as memory has room for.

Nothing is written here but the buckets that are tried. What overlaps is decided on a list of nodes, of which it is
known what they hold and what they hide.

    %r = all_reduce(%g, axis=dp)              most = 1.2 MiB: the gradients %g and %s share a bucket
    %q = all_reduce(%s, axis=dp)         ->   order = ..., %bucket, %t, wait %bucket, ...
    %t = mm(%u, %v)                           memory = 46.1 GiB, hidden = 1.3 ms
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from shardc.analysis.memory import MemoryAnalysis
from shardc.analysis.reductions import becoming_gradients
from shardc.analysis.timeline import Order, Pace, Times, in_order, timed
from shardc.cost.buckets import Buckets
from shardc.ir.facts import layer_of, origin_of
from shardc.ir.partition import partition
from shardc.ir.program import name_of
from shardc.ir.versions import GraphVersion
from shardc.passes.bucket import Joined, bucketed, made_at
from shardc.passes.overlap import ordered
from shardc.planning.compilation import Compilation, Schedule, compiler_pass

MODEST = (
    (1.0, ("all", "gradients", "nothing")), *((1 / k, ("nothing",)) for k in (2, 4, 16, 64)), (0.0, ("nothing",)),
)  # fmt: skip
"""What is tried until the generated code fits into memory: how large buckets are, as part of what the link would have,
and with them which collectives overlap."""

AT_STAKE = 0.01
"""What part of backward has to lie in collectives that wait for a bucket before it is tried without such buckets."""


ALIKE = 1e-3
"""By what part a step may take longer where that leaves layers alike, so that one function is written for all."""


ALIGNED = (False, False), (True, False), (True, True)
"""Whether buckets are to begin between repeated layers, and whether not within the last of them either."""


STRETCH, APART = 8, 1.1
"""Nodes of the stretches by which orders are compared; and how much more alike layers must be in an order whose buckets
begin within them, since a loop does not go on behind these."""


@compiler_pass
def schedule(c: Compilation) -> Compilation:
    """Choose buckets and order so that the code holds at most what the budget allows. Raises AssertionError where
    nothing fits: `assign` takes no plan of which this could be said."""
    c = replace(c, pace=Pace(c.mesh, c.options.device))
    scheduler, largest = _Scheduler(c), math.inf
    for part, ways in MODEST:
        if part < 1.0 and not largest:
            break
        most = part * largest
        chosen, joined = scheduler.tried(most, False, ways)
        largest = min(largest, joined.largest) if part == 1.0 else largest
        if joined.held > AT_STAKE * scheduler.beneath:
            other = scheduler.tried(most, True, ways)[0]
            chosen = min((one for one in (chosen, other) if one), key=lambda one: one.seconds, default=None)
        if chosen:
            return replace(c, schedule=replace(chosen, memory=replace(chosen.memory, budget=c.options.budget)))
    raise AssertionError(f"the plan was to hold {c.options.budget} bytes, its code holds {scheduler.least:.0f}")


class _Scheduler:
    """Tries buckets and orders of one program; `least` is what the smallest so far would hold, `beneath` the seconds
    that backward computes."""

    def __init__(self, c: Compilation) -> None:
        self.c, self.least = c, math.inf
        self.budget = math.inf if c.options.budget is None else c.options.budget
        self.localized = partition(c.lowered.read(), c.program)
        compute = Times(self.localized, c.pace).compute
        self.beneath = sum([compute[node] for node in self.localized.backward])

    def tried(self, most: float, apart: bool, ways: Sequence[str]) -> tuple[Schedule | None, Joined]:
        """With buckets of at most `most` bytes: the first of `ways` to overlap that fits and hides more than it stalls;
        and what the buckets are."""
        c = self.c
        buckets = Buckets(c.mesh, c.options.device, most, self.beneath) if most else None
        version, joined = self._joined(buckets, apart)
        graph, run = version.read(), joined.run
        ready, times = made_at(graph, becoming_gradients(run, graph)), Times(run, c.pace)
        memories = MemoryAnalysis(graph, run, c.program, c.mesh, c.states)
        for what in ways:
            fitting: list[tuple[Schedule, float]] = []
            for between, last in ALIGNED if joined.largest and what != "nothing" else ALIGNED[:1]:
                orders = (
                    in_order(run)
                    if what == "nothing"
                    else ordered(run, ready, times, fetch=what == "all", between=between, last=last)
                )
                memory, order = memories.memory(*orders), [*orders[0], *orders[1]]
                self.least = min(self.least, memory.peak)
                if memory.peak <= self.budget:
                    names = tuple((node.name, awaited) for node, awaited in order)
                    one = Schedule(c.lowered, version, buckets, apart, names, memory, *timed(order, times))
                    fitting.append((one, _variety(order) * (1.0 if between else APART)))
            found = _most_alike(fitting)
            if found is not None and (
                what == "nothing" or found.hidden >= 0.0
            ):  # starting may stall more than it hides
                return found, joined
        return None, joined

    def _joined(self, buckets: Buckets | None, apart: bool) -> tuple[GraphVersion, Joined]:
        """The program with its buckets written, and what they are."""
        c = self.c
        if buckets is None:
            return c.lowered, Joined(0, self.localized, 0.0)
        return bucketed(c.lowered, c.program, buckets, apart)


def _most_alike(fitting: Sequence[tuple[Schedule, float]]) -> Schedule | None:
    """Of the fastest schedules the one that leaves layers most alike, by the variety of each."""
    fastest = min((one.seconds for one, _ in fitting), default=0.0)
    near = [pair for pair in fitting if pair[0].seconds <= fastest * (1.0 + ALIKE)]
    return min(near, key=lambda pair: pair[1])[0] if near else None


def _variety(order: Order) -> int:
    """How many different stretches of a few nodes an order has: the fewer, the more layers are alike."""
    numbers: dict[tuple[str, str, bool], int] = {}
    keys: list[int] = []
    for node, awaited in order:
        module, layer = origin_of(node).module, layer_of(node)
        key = name_of(node.target), module.removeprefix(layer), awaited
        keys.append(numbers.setdefault(key, len(numbers)))
    return len(set(zip(*(keys[first:] for first in range(STRETCH)), strict=False)))
