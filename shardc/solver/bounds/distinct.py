"""Tables without their repeated rows and columns, through which messages pass faster.

Where many values of a variable differ in their unary cost only, whole rows of a table are equal, and so are whole
columns of another. The least over equal rows is that over their cheapest, so a message takes as many steps as the
smaller table has entries.

    table [3 0]     rows [3 0]     groups 0 0 1 1     costs 4 2 9 8   ->   least of each group 2 8
          [3 0]          [1 7]
          [1 7]                    message  min(2 + 3, 8 + 1), min(2 + 0, 8 + 7)  =  5 2
          [1 7]
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardc.solver import tuning
from shardc.solver.problem import Array

Index = NDArray[np.intp]
Small = NDArray[np.float64] | NDArray[np.float32]


class EqualRows:
    """Rows in groups of equal ones: `first` of each, and per row its group."""

    def __init__(self, first: Index, index: Index) -> None:
        self.first, self.index = first, index
        self.order = np.argsort(index, kind="stable")
        self.starts = np.searchsorted(index[self.order], np.arange(len(first)))

    @staticmethod
    def of(table: Array) -> EqualRows | None:
        """The rows of a table; None if all differ."""
        weights = np.sin(np.arange(1.0, table.shape[1] + 1.0))
        marks = np.where(np.isinf(table), -1.0, table) @ weights
        _, first, index = np.unique(marks, return_index=True, return_inverse=True)
        if len(first) == len(table) or not np.array_equal(table[first][index], table):
            return None
        return EqualRows(first, index)

    def least(self, cost: Array) -> Array:
        """The least of every group."""
        return np.minimum.reduceat(cost[self.order], self.starts)


class Table:
    """A table over pairs of values, as messages in either direction need it. One that changes all the time is taken as
    it is (`look`). In half the digits (`roughly`), messages take half the time."""

    def __init__(self, whole: Array, look: bool = True, roughly: bool = False) -> None:
        look = look and whole.size >= tuning.REPEATED_ENTRIES
        small = self.whole = np.ascontiguousarray(whole)
        self.rows = EqualRows.of(small) if look else None
        if self.rows is not None:
            small = small[self.rows.first]
        turned = np.ascontiguousarray(small.T)
        self.columns = EqualRows.of(turned) if look else None
        if self.columns is not None:
            turned = turned[self.columns.first]
            small = np.ascontiguousarray(turned.T)
        self.small: Small = small.astype(np.float32) if roughly else small
        self.turned: Small = turned.astype(np.float32) if roughly else turned

    def to_second(self, cost: Array) -> Array:
        """`min_x table[x, .] + cost[x]`."""
        return _message(self.small, self.rows, self.columns, cost)

    def to_first(self, cost: Array) -> Array:
        """`min_y table[., y] + cost[y]`."""
        return _message(self.turned, self.columns, self.rows, cost)


class TableCache:
    """Tables that were looked at: from one network to the next, most are the same arrays."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, bool], tuple[float, Table]] = {}
        self._known: dict[int, tuple[Array, float, float]] = {}  # each with its least and its greatest entry
        self._used: set[int] = set()

    def next(self) -> None:
        """Another network comes: what the last one did not use is forgotten."""
        self._made = {key: table for key, table in self._made.items() if key[0] in self._used}
        self._known = {key: known for key, known in self._known.items() if key in self._used}
        self._used = set()

    def least(self, array: Array) -> float:
        return self._look(array)[0]

    def under(self, ceiling: float, array: Array, roughly: bool) -> Table:
        """The table, its entries cut off at a ceiling, or at a higher one if that was done before."""
        known, highest = self._made.get((id(array), roughly)), self._look(array)[1]
        if known is None or known[0] < min(ceiling, highest):
            cut = np.minimum(array, ceiling) if highest > ceiling else array
            known = self._made[id(array), roughly] = ceiling, Table(cut, roughly=roughly)
        return known[1]

    def _look(self, array: Array) -> tuple[float, float]:
        self._used.add(id(array))
        if id(array) not in self._known:
            self._known[id(array)] = array, float(array.min()), float(array.max())
        return self._known[id(array)][1:]


def _message(table: Small, rows: EqualRows | None, columns: EqualRows | None, cost: Array) -> Array:
    if rows is not None:
        cost = rows.least(cost)
    message = (table + cost.astype(table.dtype, copy=False)[:, None]).min(axis=0).astype(np.float64, copy=False)
    return message if columns is None else message[columns.index]
