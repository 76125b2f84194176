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

from shardc.solver.problem import Array, Problem

Mask = NDArray[np.bool_]
Factor = tuple[tuple[int, ...], Array]
"""Variables, and a table with a dim for each."""
_LARGEST = 2.0**24  # entries of a factor that a check is willing to make
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
    no more than a part of themselves."""

    def __init__(self, problem: Problem, values: Sequence[NDArray[np.intp]], position: Mapping[int, int]) -> None:
        self.position, self.count = position, 0
        self.factors: dict[int, list[Factor]] = defaultdict(list)
        single = [int(left[0]) if len(left) == 1 else -1 for left in values]
        given = [
            self._entered((v,), cost[values[v]]) if single[v] < 0 else float(cost[single[v]])
            for v, cost in enumerate(problem.unary)
        ]
        parts: dict[tuple[int, bytes, bytes], Array] = {}
        marks = [left.tobytes() for left in values]
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
        low = float(table.min())
        if math.isfinite(low):
            self.count += 1
            self.factors[min(variables, key=self.position.__getitem__)].append((variables, table - low))
        return low

    def least(self, order: Sequence[int]) -> float:
        if not all(map(math.isfinite, self.given)):
            return math.inf
        found: list[float] = []
        for v in order:
            factors = self.factors.pop(v, [])
            rest = sorted({w for variables, _ in factors for w in variables} - {v}, key=self.position.__getitem__)
            if factors:
                total = _sum(factors, (*rest, v))
                if total is None:
                    return -math.inf
                table = total.min(axis=-1)
                found.append(self._entered(tuple(rest), table) if rest else float(table))
        if not all(map(math.isfinite, found)):
            return math.inf
        error = math.fsum(map(abs, self.given)) + self.count * math.fsum(found)
        return math.fsum([*self.given, *found]) - _EPSILON * error


def _sum(factors: Sequence[Factor], variables: tuple[int, ...]) -> Array | None:
    """The factors as one over these variables, if that does not grow too large."""
    sizes = {v: size for own, table in factors for v, size in zip(own, table.shape, strict=True)}
    shape = [sizes[v] for v in variables]
    if math.prod(shape) > _LARGEST:
        return None
    total = np.zeros(shape)
    for own, table in factors:
        dims = [variables.index(v) for v in own]
        total += table.transpose(np.argsort(dims)).reshape([sizes[v] if v in own else 1 for v in variables])
    return total
