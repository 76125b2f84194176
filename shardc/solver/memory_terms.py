"""What a choice holds in memory, and when: the linear side of a cost network.

A schedule has positions `0 .. length - 1`, one an operator, in the order in which generated code runs them. A holding
says that from position `start` to `end`, both included, a device holds `table[x_u]` or `table[x_u, x_v]` bytes. All
holdings of a position add up, so memory is as linear in a choice as its cost is, and a price per byte at some
positions turns a bound on memory into costs (`priced`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from shardc.solver.problem import Array, Edge, Problem, Terms

Index = NDArray[np.intp]


@dataclass(frozen=True)
class MemoryTerm:
    """`table` holds the bytes per value of variable `one`, or per pair of values of `one < other`."""

    one: int
    other: int | None
    table: Array
    start: int
    end: int


class MemoryTerms:
    """All holdings of a network. The tables of equal layers are the same arrays, as in the problem itself."""

    def __init__(self, length: int, all: Sequence[MemoryTerm]) -> None:
        self.length = length
        self.all = [holding for holding in all if holding.start <= holding.end]
        self._starts: Index = np.array([h.start for h in self.all], dtype=np.intp)
        self._ends: Index = np.array([h.end for h in self.all], dtype=np.intp)

    def timeline(self, choice: Sequence[int]) -> Array:
        """The bytes held at every position."""
        return self._summed(self._terms.at(choice), self._starts, self._ends)

    def peak(self, choice: Sequence[int]) -> float:
        """The most bytes that are held at any position."""
        return float(self.timeline(choice).max(initial=0.0))

    def changes(self, before: Sequence[int], after: Sequence[int], part: Index) -> Iterator[Array]:
        """The bytes at every position that are added where a part of the variables takes another choice, part by part
        (see `Terms.parts`)."""
        change, owner = self._terms.at(after) - self._terms.at(before), self._terms.parts(part)
        order = np.argsort(owner, kind="stable")
        for places in np.split(order, np.searchsorted(owner[order], np.arange(part.max(initial=-1) + 1)))[1:]:
            yield self._summed(change[places], self._starts[places], self._ends[places])

    def pairs(self) -> set[Edge]:
        """The variables of which bytes depend on both."""
        return {(h.one, h.other) for h in self.all if h.other is not None}

    def linked(self, problem: Problem) -> Problem:
        """The problem with all edges that prices may add to it; what these cost is left open."""
        edges: dict[Edge, Array] = {}
        for holding in self.all:
            if holding.other is not None:
                edges.setdefault((holding.one, holding.other), holding.table)
        return Problem(problem.unary, edges | problem.edges, problem.names)

    @cached_property
    def _terms(self) -> Terms:
        return Terms((h.one, h.other, h.table) for h in self.all)

    def _summed(self, held: Array, starts: Index, ends: Index) -> Array:
        change = np.zeros(self.length + 1)
        np.add.at(change, starts, held)
        np.subtract.at(change, ends + 1, held)
        return np.cumsum(change[:-1])

    def at(self, position: int) -> list[MemoryTerm]:
        """What is held at one position."""
        return [self.all[i] for i in np.flatnonzero((self._starts <= position) & (position <= self._ends))]

    def priced(self, problem: Problem, prices: Mapping[int, float]) -> Problem:
        """The problem in which every byte held at a position costs its price, in seconds."""
        steps = np.zeros(self.length + 1)
        for position, price in prices.items():
            steps[position + 1] += price
        until = np.cumsum(steps)  # what a byte costs that is held at all positions before this one
        rates = until[self._ends + 1] - until[self._starts]
        terms: dict[tuple[int, int | None], list[tuple[Array, float]]] = {}
        for place in np.flatnonzero(rates > 0.0):
            holding = self.all[place]
            terms.setdefault((holding.one, holding.other), []).append((holding.table, float(rates[place])))
        found = Problem([*problem.unary], {**problem.edges}, [*problem.names])
        sums = _Sums()
        for (one, other), added in terms.items():
            if other is None:
                found.unary[one] = sums(problem.unary[one], added)
            else:
                found.edges[one, other] = sums(problem.edges.get((one, other)), added)
        return found


@dataclass(frozen=True)
class Prices:
    """Prices on memory, in seconds for a byte held at a position, and the bound on bytes for which they were found."""

    of: Mapping[int, float]
    bound: float
    holdings: MemoryTerms


class _Sums:
    """Adds priced tables; the sum of the same arrays at the same prices is the same array."""

    def __init__(self) -> None:
        self.made: dict[object, Array] = {}

    def __call__(self, base: Array | None, added: list[tuple[Array, float]]) -> Array:
        key = (id(base), *((id(table), price) for table, price in added))
        if key not in self.made:
            total = 0.0 if base is None else base
            for table, price in added:
                total = total + table * price
            self.made[key] = np.asarray(total)
        return self.made[key]
