"""Choices found so far, each with its cost and its load: points in the plane of cost against peak load.

cost |  .        the best point within a capacity is the lowest one left of it;
     |    .  .   the search (`capacity.py`) adds points by solving with multipliers,
     |       .   and by recombining the points that it has (`recombine.py`)
     +---------- peak load
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shardc.solver.loads import Loads
from shardc.solver.problem import Array, CostTerms, Problem


@dataclass(frozen=True)
class Point:
    """A choice, its cost, and its load at every position. A `recombined` one was made of other points."""

    choice: list[int]
    cost: float
    load: Array
    recombined: bool = False

    @property
    def peak(self) -> float:
        return float(self.load.max(initial=0.0))


class Points:
    """The points of one network, in the order in which they were found."""

    def __init__(self, problem: Problem, loads: Loads) -> None:
        self.all: list[Point] = []
        self.terms = CostTerms.of(problem)
        self._loads = loads

    def evaluated(self, choice: list[int]) -> Point:
        """The point of a choice; it is not added."""
        return Point(choice, math.fsum(self.terms.at(choice).tolist()), self._loads.timeline(choice))

    def add(self, point: Point) -> None:
        self.all.append(point)

    def has(self, choice: Sequence[int]) -> bool:
        return any(point.choice == choice for point in self.all)

    def best(self, capacity: float) -> Point | None:
        """The cheapest point within a capacity."""
        return min((p for p in self.all if p.peak <= capacity), key=lambda p: p.cost, default=None)

    def smallest(self) -> Point:
        """The cheapest of the points with the smallest peak."""
        return min(self.all, key=lambda point: (point.peak, point.cost))

    def solved(self) -> list[Point]:
        """The points that a solve found, not a recombination."""
        return [point for point in self.all if not point.recombined]

    def peaks(self, above: float = -math.inf) -> list[int]:
        """The positions at which points have their peak, of those whose peak is above a capacity."""
        return sorted({int(point.load.argmax()) for point in self.all if point.peak > above})
