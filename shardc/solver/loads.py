"""Loads: the linear constraints beside the cost of a network.

There are positions `0 .. length - 1`. A load says that a choice adds `table[x_u]`, or `table[x_u, x_v]`, to every
position from `start` to `end`, both included. A *capacity* is a limit on the sum at every position:

    load_t(x) = sum of the loads that cover t   <=   capacity        for every position t

    loads (2, position 0 to 1), (3, position 1 to 2)     timeline 2 5 3     peak 5

Loads are as linear in a choice as its cost is. So Lagrange multipliers, one per position, turn a capacity into costs:
see `Loads.lagrangian`, and `capacity.py`, which looks for the multipliers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from shardc.solver.problem import Array, CostTerms, Edge, Problem

Index = NDArray[np.intp]


@dataclass(frozen=True)
class Load:
    """`table` has the load per value of variable `one`, or per pair of values of `one < other`."""

    one: int
    other: int | None
    table: Array
    start: int
    end: int


class Loads:
    """All loads of a network. The tables of repeated blocks are the same arrays, as in the problem itself."""

    def __init__(self, length: int, all: Sequence[Load]) -> None:
        self.length = length
        self.all = [load for load in all if load.start <= load.end]
        self._starts: Index = np.array([load.start for load in self.all], dtype=np.intp)
        self._ends: Index = np.array([load.end for load in self.all], dtype=np.intp)

    def timeline(self, choice: Sequence[int]) -> Array:
        """The load of a choice at every position."""
        return self._summed(self._terms.at(choice), self._starts, self._ends)

    def peak(self, choice: Sequence[int]) -> float:
        """The largest load of a choice at any position."""
        return float(self.timeline(choice).max(initial=0.0))

    def changes(self, before: Sequence[int], after: Sequence[int], part: Index) -> Iterator[Array]:
        """The load added at every position where one part of the variables takes the choice `after`, part by part.
        `part` has the part of every variable (see `CostTerms.parts`)."""
        change, owner = self._terms.at(after) - self._terms.at(before), self._terms.parts(part)
        order = np.argsort(owner, kind="stable")
        for places in np.split(order, np.searchsorted(owner[order], np.arange(part.max(initial=-1) + 1)))[1:]:
            yield self._summed(change[places], self._starts[places], self._ends[places])

    def pairs(self) -> set[Edge]:
        """The pairs of variables that have a load together."""
        return {(load.one, load.other) for load in self.all if load.other is not None}

    def linked(self, problem: Problem) -> Problem:
        """The problem with every edge that multipliers may add to it; what these edges cost is left open."""
        edges: dict[Edge, Array] = {}
        for load in self.all:
            if load.other is not None:
                edges.setdefault((load.one, load.other), load.table)
        return Problem(problem.unary, edges | problem.edges, problem.names)

    def at(self, position: int) -> list[Load]:
        """The loads that cover a position."""
        return [self.all[i] for i in np.flatnonzero((self._starts <= position) & (position <= self._ends))]

    def lagrangian(self, problem: Problem, multipliers: Mapping[int, float]) -> Problem:
        """The problem of minimising `cost(x) + sum_t multipliers[t] * load_t(x)`."""
        steps = np.zeros(self.length + 1)
        for position, multiplier in multipliers.items():
            steps[position + 1] += multiplier
        until = np.cumsum(steps)  # the multipliers of all positions before this one together
        rates = until[self._ends + 1] - until[self._starts]
        terms: dict[tuple[int, int | None], list[tuple[Array, float]]] = {}
        for place in np.flatnonzero(rates > 0.0):
            load = self.all[place]
            terms.setdefault((load.one, load.other), []).append((load.table, float(rates[place])))
        penalised = Problem([*problem.unary], {**problem.edges}, [*problem.names])
        sums = _WeightedSums()
        for (one, other), added in terms.items():
            if other is None:
                penalised.unary[one] = sums(problem.unary[one], added)
            else:
                penalised.edges[one, other] = sums(problem.edges.get((one, other)), added)
        return penalised

    @cached_property
    def _terms(self) -> CostTerms:
        return CostTerms((load.one, load.other, load.table) for load in self.all)

    def _summed(self, amounts: Array, starts: Index, ends: Index) -> Array:
        change = np.zeros(self.length + 1)
        np.add.at(change, starts, amounts)
        np.subtract.at(change, ends + 1, amounts)
        return np.cumsum(change[:-1])


@dataclass(frozen=True)
class Relaxation:
    """A Lagrangian relaxation of a capacity: a multiplier per position, in cost per unit of load."""

    multipliers: Mapping[int, float]
    capacity: float
    loads: Loads


class _WeightedSums:
    """Adds weighted tables. The sum of the same arrays with the same weights is the same array."""

    def __init__(self) -> None:
        self.made: dict[object, Array] = {}

    def __call__(self, base: Array | None, added: list[tuple[Array, float]]) -> Array:
        key = (id(base), *((id(table), weight) for table, weight in added))
        if key not in self.made:
            total = 0.0 if base is None else base
            for table, weight in added:
                total = total + table * weight
            self.made[key] = np.asarray(total)
        return self.made[key]
