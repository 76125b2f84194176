"""The cost network: what the solver minimises.

A variable `v` has a finite domain `0 .. d_v - 1` and a unary cost vector `c_v`; an edge `(u, v)` with `u < v` has a
table `t_uv` of shape `(d_u, d_v)`. The cost of a choice `x` is

    cost(x) = sum_v c_v[x_v] + sum_uv t_uv[x_u, x_v]

(a weighted constraint satisfaction problem with binary constraints; also the energy of a pairwise Markov random field).
`inf` forbids a value or a pair; NaN and `-inf` are errors.

    problem = Problem()
    a, b = problem.add_variable("a", np.array([0.0, 2.0])), problem.add_variable("b", np.array([1.0, 0.0]))
    problem.add_edge(a, b, np.array([[5.0, 5.0], [0.0, 0.0]]))
    evaluate(problem, [1, 1])      # 2.0

Where structure repeats, pass the *same* array object: the solver interns tables by identity first and by content
second, so that a hundred equal layers cost little more than one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Edge = tuple[int, int]

TOLERANCE = 1e-9
"""Differences of cost that do not count, as a part of the `magnitude` of a choice."""


@cache
def zeros(count: int) -> Array:
    """So many zeros, the same array every time."""
    made = np.zeros(count)
    made.setflags(write=False)
    return made


@dataclass
class Problem:
    """A pairwise cost network. Grow it with `add_variable` and `add_edge`."""

    unary: list[Array] = field(default_factory=lambda: list[Array]())
    edges: dict[Edge, Array] = field(default_factory=lambda: dict[Edge, Array]())
    names: list[str] = field(default_factory=lambda: list[str]())

    # Derived tables by the identities they stem from (which are kept alive), so that shared tables stay shared.
    _turned: dict[int, tuple[Array, Array]] = field(
        default_factory=lambda: dict[int, tuple[Array, Array]](), repr=False
    )
    _summed: dict[Edge, tuple[Array, Array, Array]] = field(
        default_factory=lambda: dict[Edge, tuple[Array, Array, Array]](), repr=False
    )

    def add_variable(self, name: str, cost: Array) -> int:
        """Add a variable, return its number. Number along the program: the dual bound sweeps in this order."""
        if cost.ndim != 1:
            raise ValueError(f"variable {name!r}: the unary cost must be a vector, got shape {cost.shape}")
        self.unary.append(cost)
        self.names.append(name)
        return len(self.unary) - 1

    def add_edge(self, u: int, v: int, table: Array) -> None:
        """Add `table[x_u, x_v]` to the cost. Edges between the same two variables add up; `u == v` is a diagonal."""
        shape = (len(self.unary[u]), len(self.unary[v]))
        if table.shape != shape:
            raise ValueError(f"edge {self.names[u]!r} - {self.names[v]!r}: table {table.shape}, domains {shape}")
        if u == v:
            self.unary[u] = self._sum(self.unary[u], np.diagonal(table))
        else:
            key, table = ((u, v), table) if u < v else ((v, u), self._turn(table))
            self.edges[key] = self._sum(self.edges[key], table) if key in self.edges else table

    def check(self) -> None:
        """Raise ValueError on wrong shapes, NaN or -inf."""
        if len(self.names) != len(self.unary):
            raise ValueError(f"{len(self.names)} names for {len(self.unary)} variables")
        seen: set[int] = set()
        for v, cost in enumerate(self.unary):
            _check_entries(cost, lambda v=v: f"variable {self.names[v]!r}", seen)
        for (u, v), table in self.edges.items():
            if not u < v or table.shape != (len(self.unary[u]), len(self.unary[v])):
                what = f"{self._edge(u, v)}: ({u}, {v}) with table {table.shape}"
                raise ValueError(f"{what} does not fit the domains")
            _check_entries(table, lambda u=u, v=v: self._edge(u, v), seen)

    def _edge(self, u: int, v: int) -> str:
        return f"edge {self.names[u]!r} - {self.names[v]!r}"

    def _turn(self, table: Array) -> Array:
        if id(table) not in self._turned:
            self._turned[id(table)] = (np.ascontiguousarray(table.T), table)
        return self._turned[id(table)][0]

    def _sum(self, a: Array, b: Array) -> Array:
        key = (id(a), id(b))
        if key not in self._summed:
            self._summed[key] = (a + b, a, b)
        return self._summed[key][0]


class CostTerms:
    """Entries of many tables at a choice; equal tables are read at once. A term is a variable or two, and a table."""

    def __init__(self, terms: Iterable[tuple[int, int | None, Array]]) -> None:
        groups: dict[int, tuple[Array, list[int]]] = {}
        ends: list[tuple[int, int]] = []
        for one, other, table in terms:
            groups.setdefault(id(table), (table, []))[1].append(len(ends))
            ends.append((one, one if other is None else other))
        self._ends = np.array(ends, dtype=np.intp).reshape(-1, 2)
        self._groups = [(table, np.array(places)) for table, places in groups.values()]

    @staticmethod
    def of(problem: Problem) -> CostTerms:
        """The terms of a problem's cost."""
        alone = ((v, None, cost) for v, cost in enumerate(problem.unary))
        return CostTerms([*alone, *((u, v, table) for (u, v), table in problem.edges.items())])

    def at(self, choice: Sequence[int]) -> Array:
        """Every term's entry, in order."""
        values, entries = np.array(choice, dtype=np.intp)[self._ends], np.empty(len(self._ends))
        for table, places in self._groups:
            one, other = values[places].T
            entries[places] = table[one] if table.ndim == 1 else table[one, other]
        return entries

    def parts(self, part: NDArray[np.intp]) -> NDArray[np.intp]:
        """Per term the part that it belongs to, given that of every variable, -1 for none; parts share no term."""
        return part[self._ends].max(axis=1, initial=-1)


def evaluate(problem: Problem, choice: Sequence[int]) -> float:
    """The cost of a choice, summed exactly and rounded once, so that it does not depend on the order of terms."""
    return math.fsum(_terms(problem, choice))


def magnitude(problem: Problem, choice: Sequence[int]) -> float:
    """The sum of absolute values of the terms of a choice."""
    return math.fsum(map(abs, _terms(problem, choice)))


def _terms(problem: Problem, choice: Sequence[int]) -> list[float]:
    terms = [cost.item(x) for cost, x in zip(problem.unary, choice, strict=True)]
    return terms + [table.item(choice[u], choice[v]) for (u, v), table in problem.edges.items()]


def _check_entries(table: Array, what: Callable[[], str], seen: set[int]) -> None:
    if id(table) in seen:
        return
    seen.add(id(table))
    if np.isnan(table).any() or (table == -np.inf).any():
        raise ValueError(f"{what()}: costs must be finite or +inf")
