"""Interned arrays, and the few computations on tables that several parts of the solver need.

An equal table has an equal number, so a computation on tables can be remembered by the numbers of its operands.
That is what makes a hundred equal layers cost little more than one.

    pool.add(np.eye(2)) == pool.add(np.eye(2))                 one number, one array
    pool.derive(("sum", 3, 5), lambda: ...)                    computed once, whoever asks
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from shardc.solver import tuning
from shardc.solver.problem import Array

Mask = NDArray[np.bool_]
Oriented = tuple[int, bool]  # number of a table in the pool, and whether it is to be read transposed

_HUGE = 1e300  # stands for inf where a difference is formed


class Pool:
    """Arrays by number; equal content, equal number. `derive` remembers computations on numbers."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self._by_content: dict[tuple[tuple[int, ...], bytes], int] = {}
        self._by_identity: dict[int, tuple[int, Array]] = {}
        self._derived: dict[tuple[object, ...], int] = {}
        self._finite: dict[int, bool] = {}

    def add(self, array: Array) -> int:
        array = np.ascontiguousarray(array, dtype=np.float64)
        key = (array.shape, array.tobytes())
        if key not in self._by_content:
            self._by_content[key] = len(self.arrays)
            self.arrays.append(array)
        return self._by_content[key]

    def add_shared(self, array: Array) -> int:
        """As `add`, but an array object seen before is not read again."""
        if id(array) not in self._by_identity:
            self._by_identity[id(array)] = (self.add(array), array)
        return self._by_identity[id(array)][0]

    def derive(self, key: tuple[object, ...], compute: Callable[[], Array]) -> int:
        if key not in self._derived:
            self._derived[key] = self.add(compute())
        return self._derived[key]

    def read(self, oriented: Oriented) -> Array:
        table = self.arrays[oriented[0]]
        return table.T if oriented[1] else table

    def finite(self, number: int) -> bool:
        if number not in self._finite:
            self._finite[number] = bool(np.isfinite(self.arrays[number]).all())
        return self._finite[number]


class Restriction:
    """Costs and tables over fewer values of every variable. The part of one table by equal masks is one array."""

    def __init__(self, keep: Sequence[Mask]) -> None:
        self._keep, self._marks = keep, [mask.tobytes() for mask in keep]
        self._made: dict[tuple[int, bytes, bytes], tuple[Array, Array]] = {}

    def __call__(self, table: Array, u: int, v: int) -> Array:
        key = id(table), self._marks[u], self._marks[v]
        if key not in self._made:
            self._made[key] = table[np.ix_(self._keep[u], self._keep[v])], table  # alive, so that its id stays its own
        return self._made[key][0]

    def of_cost(self, cost: Array, v: int) -> Array:
        key = id(cost), self._marks[v], b""
        if key not in self._made:
            self._made[key] = cost[self._keep[v]], cost
        return self._made[key][0]


def first_minimum(cost: Array) -> int:
    """The smallest index of a minimum, ties taken up to rounding, so that equal choices give one stable answer."""
    least = float(cost.min())
    return int(np.argmax(cost <= least + 1e-13 * abs(least)))


def min_plus(a: Array, middle: Array, b: Array) -> Array:
    """`out[i, j] = min_k a[k, i] + middle[k] + b[k, j]`."""
    left = np.ascontiguousarray((a + middle[:, None]).T)
    right = np.ascontiguousarray(b)
    out = left[:, :1] + right[:1]
    buffer = np.empty_like(out)
    for k in range(1, len(right)):
        np.add(left[:, k : k + 1], right[k : k + 1], out=buffer)
        np.minimum(out, buffer, out=out)
    return out


def undominated(cost: Array, tables: list[Array]) -> Mask:
    """Which values no other value replaces at no loss; of equal values the smallest index stays. Needs consistency."""
    n = len(cost)
    keep = np.ones(n, dtype=np.bool_)
    if n < 2 or n * n * max((t.shape[1] for t in tables), default=1) > tuning.DOMINANCE_ENTRIES:
        return keep
    worse = cost[:, None] - cost[None, :]  # worse[b, a]: the most that b can cost more than a
    for table in tables:
        clipped = np.ascontiguousarray(np.minimum(table, _HUGE).T)
        worse += (clipped[:, :, None] - clipped[:, None, :]).max(axis=0)  # over the first dim, which numpy does fastest
    replaces = worse <= 0.0
    np.fill_diagonal(replaces, False)
    for a in np.flatnonzero(replaces.any(axis=0))[::-1]:
        if (replaces[:, a] & keep).any():
            keep[a] = False
    return keep
