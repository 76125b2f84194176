"""Passes over a large network in compiled code: all its arrays side by side in a few long ones.

    messages   m01 m02 m12 ...           first[first_at[e] : first_at[e + 1]] is the message of edge e to its first end
    tables     t0 t1 ...                 each distinct table once, as it is and turned; table[e] tells which
    groups     rows of t0, columns ...   per value its place in the smaller table (`distinct.py`), where there is one

What `bound.py` does in numpy an edge at a time is done here without a temporary array, sweeps to the last bit the same
(where tables are all in full digits, or all in half). Numba compiles it on first use and keeps the machine code beside
this file or in the user's cache. Loading even that takes half a second, so only what takes longer comes here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from shardc.solver import pool
from shardc.solver.bounds.distinct import EqualRows, Table
from shardc.solver.problem import Array, Edge

Index = NDArray[np.int64]
Numbers = NDArray[Any]  # all of a network in float64, or all in float32
Function = TypeVar("Function", bound=Callable[..., Any])
_NONE = -1


def _compiled(function: Function) -> Function:
    try:
        compiled = numba.njit(cache=True)(function)
    except RuntimeError:  # neither folder can be written to
        compiled = numba.njit(function)
    return cast(Function, compiled)


first_minimum = _compiled(pool.first_minimum)  # numba looks for changes in the caller's file: touch this one too


class Flat(NamedTuple):
    """A network in flat arrays. `*_at` has where things begin, one entry more than there are things."""

    costs: Array
    costs_at: Index
    share: Array
    ahead: Index
    ahead_at: Index
    behind: Index
    behind_at: Index
    first_at: Index
    second_at: Index
    ends: Index
    table: Index
    shape: Index
    tables: Numbers
    turned: Numbers
    tables_at: Index
    groups: Index
    rows_at: Index
    columns_at: Index

    @staticmethod
    def of(
        unary: Sequence[Array], ends: Sequence[Edge], tables: Sequence[Table], share: Sequence[float],
        ahead: Sequence[Sequence[int]], behind: Sequence[Sequence[int]],
    ) -> Flat:  # fmt: skip
        distinct = {id(table): table for table in tables}
        number = {key: place for place, key in enumerate(distinct)}
        each, sizes = list(distinct.values()), np.array([len(cost) for cost in unary])
        rows, columns = [t.rows for t in each], [t.columns for t in each]
        groups, groups_at = _joined([_NOTHING if alike is None else alike.index for alike in (*rows, *columns)])
        costs, costs_at = _joined(unary)
        small, small_at = _joined([t.small.ravel() for t in each])
        both = np.array(ends, dtype=np.int64)
        return Flat(
            costs, costs_at, np.array(share),
            *_joined([np.array(edges, dtype=np.int64) for edges in ahead]),
            *_joined([np.array(edges, dtype=np.int64) for edges in behind]),
            _starts(sizes[both[:, 0]]), _starts(sizes[both[:, 1]]), both,
            np.array([number[id(table)] for table in tables]), np.array([t.small.shape for t in each]),
            small, np.concatenate([t.turned.ravel() for t in each]), small_at,
            groups, _where(rows, groups_at[: len(each)]), _where(columns, groups_at[len(each) : -1]),
        )  # fmt: skip

    def forward(self, to_first: Sequence[Array], to_second: Sequence[Array]) -> list[Array]:
        """The messages to second ends after a pass forward."""
        second = np.concatenate(to_second)
        _forward(self, np.concatenate(to_first), second)
        return _parted(second, self.second_at)

    def backward(self, to_first: Sequence[Array], to_second: Sequence[Array]) -> tuple[float, list[Array], list[Array]]:
        """All constants that a pass backward takes out, the messages to first ends after it, and per variable what
        every value costs more than its cheapest."""
        first, reduced = np.concatenate(to_first), np.empty_like(self.costs)
        lower = _backward(self, first, np.concatenate(to_second), reduced)
        return lower, _parted(first, self.first_at), _parted(reduced, self.costs_at)

    def best_of_forest(
        self, rows: Sequence[int], parents: Sequence[tuple[int, int]], picked: Sequence[bool], choice: Sequence[int]
    ) -> list[int]:
        """The cheapest choice that differs in picked variables only; `parents` has a neighbour and the edge to it."""
        best = np.array(choice)
        _best_of_forest(self, np.array(rows), np.array(parents), np.array(picked), best)
        return best.tolist()


_NOTHING = np.zeros(0, dtype=np.int64)


def _starts(sizes: Index) -> Index:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _joined(parts: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], Index]:
    return np.concatenate(parts), _starts(np.array([len(part) for part in parts]))


def _parted(flat: Array, starts: Index) -> list[Array]:
    places = starts.tolist()
    return [flat[a:b] for a, b in pairwise(places)]


def _where(groups: Sequence[EqualRows | None], starts: Index) -> Index:
    return np.array([_NONE if alike is None else start for alike, start in zip(groups, starts, strict=True)])


@_compiled
def _rewritten(net: Flat, v: int, first: Array, second: Array, cost: Array) -> int:
    """`C_v`, into `cost`; how many values there are."""
    start = net.costs_at[v]
    size = net.costs_at[v + 1] - start
    for i in range(size):
        cost[i] = net.costs[start + i]
    for k in range(net.behind_at[v], net.behind_at[v + 1]):
        at = net.second_at[net.behind[k]]
        for i in range(size):
            cost[i] += second[at + i]
    for k in range(net.ahead_at[v], net.ahead_at[v + 1]):
        at = net.first_at[net.ahead[k]]
        for i in range(size):
            cost[i] += first[at + i]
    return size


@_compiled
def _grouped(net: Flat, at: int, size: int) -> Index:
    return net.groups[at : at + size] if at >= 0 else net.groups[:0]


@_compiled
def _scratch(net: Flat) -> tuple[Array, Numbers, Numbers]:
    most = 0
    for v in range(len(net.share)):
        most = max(most, net.costs_at[v + 1] - net.costs_at[v])
    return np.empty(most), np.empty(most, net.tables.dtype), np.empty(most, net.tables.dtype)


@_compiled
def _send(
    net: Flat, e: int, second: bool, cost: Array, old: Array, least: Numbers, sums: Numbers, message: Array
) -> float:
    """The message over an edge to its second end, or to its first, `min_x table[x, .] + cost[x] - old[x]`, less its
    least; that least."""
    t = net.table[e]
    mine, theirs, width = int(net.rows_at[t]), int(net.columns_at[t]), net.shape[t, 1]
    table = net.tables[net.tables_at[t] : net.tables_at[t + 1]]
    if not second:
        mine, theirs, width = theirs, mine, net.shape[t, 0]
        table = net.turned[net.tables_at[t] : net.tables_at[t + 1]]
    height, groups, spread = len(table) // width, _grouped(net, mine, len(old)), _grouped(net, theirs, len(message))
    if len(groups):
        kept = np.full(height, np.inf)
        for i in range(len(old)):
            kept[groups[i]] = min(kept[groups[i]], cost[i] - old[i])
        for i in range(height):
            least[i] = kept[i]
    else:
        for i in range(height):
            least[i] = cost[i] - old[i]
    for j in range(width):
        sums[j] = table[j] + least[0]
    for i in range(1, height):
        row, more = table[i * width : (i + 1) * width], least[i]
        for j in range(width):
            both = row[j] + more
            sums[j] = both if both < sums[j] else sums[j]
    low = np.float64(sums[0])
    for j in range(1, width):
        low = min(low, np.float64(sums[j]))
    for j in range(len(message)):
        message[j] = np.float64(sums[spread[j] if len(spread) else j]) - low
    return low


@_compiled
def _forward(net: Flat, first: Array, second: Array) -> None:
    cost, least, sums = _scratch(net)
    for u in range(len(net.share)):
        for i in range(_rewritten(net, u, first, second, cost)):
            cost[i] *= net.share[u]
        for k in range(net.ahead_at[u], net.ahead_at[u + 1]):
            e = net.ahead[k]
            old, new = first[net.first_at[e] : net.first_at[e + 1]], second[net.second_at[e] : net.second_at[e + 1]]
            _send(net, e, True, cost, old, least, sums, new)


@_compiled
def _backward(net: Flat, first: Array, second: Array, reduced: Array) -> float:
    cost, least, sums = _scratch(net)
    lower = 0.0
    for v in range(len(net.share) - 1, -1, -1):
        size, start = _rewritten(net, v, first, second, cost), net.costs_at[v]
        low = cost[0]
        for i in range(1, size):
            low = min(low, cost[i])
        lower += low
        for i in range(size):
            cost[i] -= low
            reduced[start + i] = cost[i]
            cost[i] *= net.share[v]
        for k in range(net.behind_at[v], net.behind_at[v + 1]):
            e = net.behind[k]
            new, old = first[net.first_at[e] : net.first_at[e + 1]], second[net.second_at[e] : net.second_at[e + 1]]
            lower += _send(net, e, False, cost, old, least, sums, new)
    return lower


@_compiled
def _add_row(net: Flat, e: int, v: int, other: int, cost: Array) -> None:
    """Add what the values of `v` cost over an edge whose other end has the value `other`."""
    t, first = net.table[e], net.ends[e, 0] == v
    mine, theirs, step, far = net.rows_at[t], net.columns_at[t], net.shape[t, 1], 1
    if not first:
        mine, theirs, step, far = theirs, mine, far, step
    start = net.tables_at[t] + far * (net.groups[theirs + other] if theirs >= 0 else other)
    for i in range(len(cost)):
        cost[i] += net.tables[start + step * (net.groups[mine + i] if mine >= 0 else i)]


@_compiled
def _best_of_forest(net: Flat, rows: Index, parents: Index, picked: NDArray[np.bool_], choice: Index) -> None:
    costs, (message, least, sums) = net.costs.copy(), _scratch(net)
    old = np.zeros(len(message))
    for i in range(len(rows) - 1, -1, -1):
        v = rows[i]
        cost = costs[net.costs_at[v] : net.costs_at[v + 1]]
        for k in range(net.behind_at[v], net.behind_at[v + 1]):
            u = net.ends[net.behind[k], 0]
            if not picked[u]:
                _add_row(net, net.behind[k], v, int(choice[u]), cost)
        for k in range(net.ahead_at[v], net.ahead_at[v + 1]):
            u = net.ends[net.ahead[k], 1]
            if not picked[u]:
                _add_row(net, net.ahead[k], v, int(choice[u]), cost)
        u, e = parents[i]
        if u >= 0:
            above = costs[net.costs_at[u] : net.costs_at[u + 1]]
            low = _send(net, e, v < u, cost, old[: len(cost)], least, sums, message[: len(above)])
            for j in range(len(above)):
                above[j] += message[j] + low
    for i in range(len(rows)):
        v = rows[i]
        cost = costs[net.costs_at[v] : net.costs_at[v + 1]]
        u, e = parents[i]
        if u >= 0:
            _add_row(net, e, v, int(choice[u]), cost)
        choice[v] = first_minimum(cost)
