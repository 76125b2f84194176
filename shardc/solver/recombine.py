"""Better choices within a capacity, made of choices that are known.

Multipliers leave a gap. Where a network repeats a block, all copies change at the same multiplier, though the capacity
may ask it of some only. Three heuristics choose per copy:

* *merge*: two choices differ in parts that share no table; each part may be taken from either (a greedy knapsack);
* *splice*: where they differ in a way that links all layers, one up to some layer, the other from there on;
* *polish*: exact over one forest of variables at a time (`exact/forest.py`), at smaller multipliers.

    within the capacity  a a a a a a      over it  b b b b b b      merged  b a b a a b      spliced  b b b a a a
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from shardc.solver import tuning
from shardc.solver.bounds.bound import Bound
from shardc.solver.exact.forest import step
from shardc.solver.layers.fold import Fold
from shardc.solver.loads import Loads
from shardc.solver.pareto import Point, Points
from shardc.solver.problem import Problem


class Recombination:
    """Makes points of points. `fold` tells the layers of the network, if it has many."""

    def __init__(self, problem: Problem, loads: Loads, points: Points, fold: Fold | None) -> None:
        self.problem, self.loads, self.points, self.fold = problem, loads, points, fold

    def merge(self, capacity: float, multipliers: Mapping[int, float]) -> None:
        """Merge points within the capacity with cheaper ones over it, those that are best in the Lagrangian."""
        best = self.points.best(capacity)
        if best is None:
            return

        def penalised(point: Point) -> float:
            return point.cost + math.fsum(multiplier * float(point.load[t]) for t, multiplier in multipliers.items())

        solved = self.points.solved()
        many = 1 if self.fold else tuning.MERGED_CHOICES
        large = sorted((p for p in solved if p.peak > capacity), key=penalised)[:many]
        small = sorted((p for p in solved if p.peak <= capacity and p is not best), key=penalised)[:many]
        self._add_best([self._merged(one, other, capacity) for one in (best, *small) for other in large], capacity)
        if self.fold:
            self._splice(self.fold, capacity)

    def polish(self, capacity: float, multipliers: Mapping[int, float], deadline: float) -> None:
        """Take the best values of one forest after the other, at smaller multipliers, as far as that fits."""
        for part in tuning.POLISH_PARTS:
            lower = self.loads.lagrangian(self.problem, {t: part * m for t, m in multipliers.items()})
            network = Bound(lower.unary, lower.edges)
            for turn in range(tuning.POLISH_FORESTS):
                best = self.points.best(capacity)
                if best is None or time.process_time() > deadline:
                    return
                other = self._merged(best, self.points.evaluated(step(network, best.choice, turn)), capacity)
                if other.cost < best.cost:
                    self.points.add(other)

    def _add_best(self, made: Iterable[Point], capacity: float) -> None:
        """Add the best of the points that were made, if it is better than all within the capacity."""
        best = self.points.best(capacity)
        assert best is not None
        cheapest = min(made, key=lambda point: point.cost, default=best)
        if cheapest.cost < best.cost:
            self.points.add(cheapest)

    def _splice(self, fold: Fold, capacity: float) -> None:
        """Splice the two points on either side of the capacity, at their first layers and at their last."""
        solved = self.points.solved()
        fitting = [p for p in solved if p.peak <= capacity] or [p for p in self.points.all if p.peak <= capacity]
        small = max(fitting, key=lambda point: point.peak)
        large = min((p for p in solved if p.peak > capacity), key=lambda point: point.peak, default=small)
        ends = () if large is small else (False, True)
        self._add_best([self._spliced(fold, small, large, capacity, first) for first in ends], capacity)

    def _spliced(self, fold: Fold, small: Point, large: Point, capacity: float, first: bool) -> Point:
        """As many of the first layers (or the last) of the large point as fit, the rest of the small one. The number is
        found by interpolation between the peaks."""
        layers, last = fold.layers, fold.count
        fits, over = 0, last + 1
        best, peaks = small, [small.peak, large.peak]
        for _ in range(tuning.SPLICES):
            part = (capacity - peaks[0]) / max(peaks[1] - peaks[0], 1.0)
            count = min(max(fits + int(part * (over - fits)), fits + 1), over - 1)
            if not fits < count < over:
                break
            taken = (layers >= 0) & ((layers < count) if first else (layers >= last - count))
            point = self.points.evaluated(np.where(taken, large.choice, small.choice).tolist())
            if point.peak > capacity:
                over, peaks[1] = count, point.peak
                continue
            fits, peaks[0] = count, point.peak
            best = min(best, point, key=lambda one: one.cost)
        return replace(best, recombined=True)

    def _merged(self, small: Point, large: Point, capacity: float) -> Point:
        """The small point with every part of the large one that is cheaper and fits; what saves most per load first."""
        choice, load, parts = [*small.choice], small.load.copy(), self._parts(small.choice, large.choice)
        part = np.full(len(choice), -1)
        for number, variables in enumerate(parts):
            part[variables] = number
        terms = self.points.terms
        owner = terms.parts(part)
        with np.errstate(invalid="ignore"):  # what both forbid is no difference
            differences = np.nan_to_num(
                terms.at(large.choice) - terms.at(small.choice), nan=0.0, posinf=np.inf, neginf=-np.inf
            )
        cheaper = differences[owner >= 0]
        gains: list[float] = np.bincount(owner[owner >= 0], cheaper, len(parts)).tolist()
        changes = self.loads.changes(small.choice, large.choice, part)
        swaps = [
            (gain / max(float(change.max()), 1.0), change, variables)
            for gain, change, variables in zip(gains, changes, parts, strict=True)
            if gain < 0.0
        ]
        for _, change, variables in sorted(swaps, key=lambda swap: swap[0]):
            if float((load + change).max()) <= capacity:
                load += change
                for v in variables:
                    choice[v] = large.choice[v]
        return replace(self.points.evaluated(choice), recombined=True)

    def _parts(self, one: Sequence[int], other: Sequence[int]) -> list[list[int]]:
        """The variables in which two choices differ, in connected components: parts that share no table."""
        left = {v for v, (x, y) in enumerate(zip(one, other, strict=True)) if x != y}
        components: list[list[int]] = []
        while left:
            stack, component = [left.pop()], list[int]()
            while stack:
                v = stack.pop()
                component.append(v)
                near = self._neighbours[v] & left
                left -= near
                stack += near
            components.append(sorted(component))
        return sorted(components)

    @cached_property
    def _neighbours(self) -> list[set[int]]:
        neighbours: list[set[int]] = [set() for _ in self.problem.unary]
        for u, v in [*self.problem.edges, *self.loads.pairs()]:
            neighbours[u].add(v)
            neighbours[v].add(u)
        return neighbours
