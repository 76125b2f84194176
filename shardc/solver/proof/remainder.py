"""The least that is left: where messages prove nearly all, what they leave open is small enough to be searched whole.

By the bound `L` of a certificate, a choice with `x_v = a` costs at least

    L + C_v[a] + sum over the edges e = (u, v) of min_y (T_e[y, a] + C_u[y])

where `C` and `T` are the costs and the tables with their messages, less their minima: every term of the cost is there
at most once. Where that is not below what is to be undercut, `a` is left out. What stays is eliminated variable by
variable: the factors that mention `v` are added up, and their least over `x_v` becomes one over its neighbours.

    L = 9.99, to be undercut: 10.0      x: {a, b, c, d} -> {a, c}    y: {a, ..., z} -> {b}    ...
    least of what is left: 10.0         so nothing costs less than 10.0

This belongs to the check of certificates, which the solver asks too; it uses nothing of the solver's.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardc.solver import tuning
from shardc.solver.problem import Array, Problem

Mask = NDArray[np.bool_]
Factor = tuple[tuple[int, ...], Array]
"""Variables, and a table with a dim for each."""
Term = tuple[tuple[int, ...], Array]
"""Dims of a sum, and a table over these."""
_EPSILON = 4.0 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Remainder:
    """What a certificate leaves to a search: every choice cheaper than `below` is among what is left. The `order` in
    which variables are eliminated: those that have more than one value left, and maybe others."""

    below: float
    order: tuple[int, ...]


def least_left(problem: Problem, keep: Sequence[Mask], order: Sequence[int]) -> float:
    """What every choice among the values that are kept costs at least, rounded down by more than the arithmetic can
    have erred: -inf, which is nothing, where the order lacks a variable or its factors grow too large."""
    values = [np.flatnonzero(mask) for mask in keep]
    if not all(map(len, values)):
        return math.inf
    position = {v: place for place, v in enumerate(order)}
    if len(position) < len(order) or {v for v, left in enumerate(values) if len(left) > 1} - position.keys():
        return -math.inf
    return _Elimination(problem, values, position).least(order)


class _Elimination:
    """Factors, each at the first of its variables in the order, less its minimum: sums of what is not negative err by
    no more than a part of themselves. Equal layers cost little more than one: what is made of the same arrays is made
    once."""

    def __init__(self, problem: Problem, values: Sequence[NDArray[np.intp]], position: Mapping[int, int]) -> None:
        self.position, self.count = position, 0
        self.factors: dict[int, list[Factor]] = defaultdict(list)
        self._above: dict[int, tuple[float, Array, Array]] = {}  # with the array itself, so that identities last
        self._least: dict[tuple[object, ...], Array | None] = {}
        single = [int(left[0]) if len(left) == 1 else -1 for left in values]
        marks = [left.tobytes() for left in values]
        parts: dict[tuple[int, bytes, bytes], Array] = {}

        def part(v: int, cost: Array) -> Array:
            key = id(cost), marks[v], b""
            if key not in parts:
                parts[key] = cost[values[v]]
            return parts[key]

        given = [
            self._entered((v,), part(v, cost)) if single[v] < 0 else float(cost[single[v]])
            for v, cost in enumerate(problem.unary)
        ]
        for (u, v), table in problem.edges.items():
            if single[u] >= 0 and single[v] >= 0:
                given.append(float(table[single[u], single[v]]))
                continue
            key = id(table), marks[u], marks[v]
            if key not in parts:
                parts[key] = table[np.ix_(values[u], values[v])].squeeze()
            given.append(self._entered(tuple(w for w in (u, v) if single[w] < 0), parts[key]))
        self.given = given

    def _entered(self, variables: tuple[int, ...], table: Array) -> float:
        """The minimum of a factor, which is entered without it."""
        if id(table) not in self._above:
            low = float(table.min())
            self._above[id(table)] = low, table - low if math.isfinite(low) else table, table
        low, above, _ = self._above[id(table)]
        if math.isfinite(low):
            self.count += 1
            self.factors[min(variables, key=self.position.__getitem__)].append((variables, above))
        return low

    def least(self, order: Sequence[int]) -> float:
        if not all(map(math.isfinite, self.given)):
            return math.inf
        minima: list[float] = []
        for v in order:
            factors = self.factors.pop(v, [])
            rest = sorted({w for variables, _ in factors for w in variables} - {v}, key=self.position.__getitem__)
            if factors:
                table = self._eliminated(factors, (*rest, v))
                if table is None:
                    return -math.inf
                minima.append(self._entered(tuple(rest), table) if rest else float(table))
        if not all(map(math.isfinite, minima)):
            return math.inf
        error = math.fsum(map(abs, self.given)) + self.count * math.fsum(minima)
        return math.fsum([*self.given, *minima]) - _EPSILON * error

    def _eliminated(self, factors: Sequence[Factor], variables: tuple[int, ...]) -> Array | None:
        """The sum of factors, and of that the least over the last variable, if that does not grow too large."""
        place = {v: i for i, v in enumerate(variables)}
        terms = [(tuple([place[v] for v in mentioned]), table) for mentioned, table in factors]
        key = (*((dims, id(table)) for dims, table in terms),)
        if key not in self._least:
            total = _sum(terms, len(variables))
            self._least[key] = None if total is None else total.min(axis=-1)
        return self._least[key]


def _sum(terms: Sequence[Term], rank: int) -> Array | None:
    """Tables, each over some of the dims, as one over all of them, if that does not grow too large."""
    sizes = {dim: size for dims, table in terms for dim, size in zip(dims, table.shape, strict=True)}
    shape = [sizes[dim] for dim in range(rank)]
    if math.prod(shape) > tuning.CHECKED_FACTOR_ENTRIES:
        return None
    total = np.zeros(shape)
    for dims, table in terms:
        total += table.transpose(np.argsort(dims)).reshape([sizes[d] if d in dims else 1 for d in range(rank)])
    return total
