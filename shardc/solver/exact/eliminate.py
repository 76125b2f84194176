"""Finish exactly: delete values by reduced cost, then eliminate variables one by one (bucket elimination).

*Pruning.* With a bound `L`, an incumbent `U` and a reduced cost `r_v[a]` (see `bound.py`), every choice with `x_v = a`
costs at least `L + r_v[a]`. If that is not below `U`, deleting `a` cannot lose a better choice.

*Elimination* (Dechter 1999, "Bucket elimination"). To eliminate `v`, add up all factors (unary costs and tables) that
mention it, `f(x_v, x_A)` over its neighbours `A`, and put `g(x_A) = min_xv f` in their place. A factor has one dim per
neighbour, so the order matters.

    a - v - b    f[a, b, v] = c_v[v] + t_av[a, v] + t_vb[v, b]    g[a, b] = min over v of f    a - b

Two greedy orders are tried, the one with the smallest factor (weight) and the one that adds the least table mass
(fill), on sizes alone. The cheaper is carried out if its factors fit the limits; of a large network the first, if it
fits.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardc.solver import tuning
from shardc.solver.pool import Mask, first_minimum
from shardc.solver.problem import Array, Edge

_OUT_OF_REACH = 1e6  # score above all others


@dataclass(frozen=True)
class EliminationOrder:
    """An elimination order with the entries of its largest factor and of all factors."""

    variables: list[int]
    largest: float
    total: float

    @property
    def narrow(self) -> bool:
        return self.largest <= tuning.FACTOR_ENTRIES and self.total <= tuning.WORK_ENTRIES


@dataclass(frozen=True)
class JointTable:
    """A table over variables; one dimension each."""

    variables: tuple[int, ...]
    table: Array


def forbidding(edges: Mapping[Edge, Array]) -> dict[Edge, Mask]:
    """What the tables that forbid pairs of values allow."""
    known = {id(table): np.isfinite(table) for table in edges.values()}
    some = {mark for mark, allowed in known.items() if not allowed.all()}
    return {edge: known[id(table)] for edge, table in edges.items() if id(table) in some}


def surviving(
    reduced: Sequence[Array], forbidding: Mapping[Edge, Mask], gap: float, incumbent: Sequence[int]
) -> list[Mask]:
    """Which values may belong to a solution cheaper than the incumbent; the incumbent's own values stay.

    Values left without a finite partner go too, as the bound needs one in every row.
    """
    keep = [cost < gap for cost in reduced]
    for mask, value in zip(keep, incumbent, strict=True):
        mask[value] = True
    changed = True
    while changed:
        changed = False
        for (u, v), allowed in forbidding.items():
            for w, partner in ((u, allowed[:, keep[v]].any(axis=1)), (v, allowed[keep[u]].any(axis=0))):
                if (keep[w] & ~partner).any():
                    keep[w], changed = keep[w] & partner, True
    return keep


def find_order(sizes: Sequence[int], edges: Sequence[Edge]) -> EliminationOrder:
    """The better of two greedy orders; of a large network, the one that is found sooner, if it is narrow."""
    quick = quick_order(sizes, edges)
    if quick.narrow and len(sizes) > tuning.TWO_ORDERS:
        return quick
    return min(_greedy_order(sizes, edges, fill=True), quick, key=lambda order: order.total)


def quick_order(sizes: Sequence[int], edges: Sequence[Edge]) -> EliminationOrder:
    """The greedy order that is found in a fourth of the other's time, and seldom less narrow."""
    return _greedy_order(sizes, edges, fill=False)


def _greedy_order(sizes: Sequence[int], edges: Sequence[Edge], *, fill: bool) -> EliminationOrder:
    around: list[set[int]] = [set() for _ in sizes]
    for u, v in edges:
        if sizes[u] > 1 and sizes[v] > 1:  # a single value is no dimension
            around[u].add(v)
            around[v].add(u)
    log = [math.log2(size) for size in sizes]
    limit = math.log2(tuning.FACTOR_ENTRIES)

    def weight(v: int) -> float:
        return log[v] + sum(log[u] for u in around[v])

    def added(v: int) -> float:
        mass = weight(v)
        if mass > limit:  # out of reach unless its neighbours go first
            return _OUT_OF_REACH + mass
        ring = sorted(around[v])
        return sum(log[a] + log[b] for i, a in enumerate(ring) for b in ring[i + 1 :] if b not in around[a])

    score = [added(v) if fill else weight(v) for v in range(len(sizes))]
    heap = [(s, v) for v, s in enumerate(score)]
    heapq.heapify(heap)
    variables: list[int] = []
    done = [False] * len(sizes)
    largest = total = 0.0
    while heap:
        s, v = heapq.heappop(heap)
        if done[v] or s != score[v]:
            continue
        done[v] = True
        variables.append(v)
        mass = 2.0 ** min(weight(v), 200.0)
        largest, total = max(largest, mass), total + mass
        if mass > tuning.FACTOR_ENTRIES or total > tuning.WORK_ENTRIES:
            return EliminationOrder(variables, largest, math.inf)
        ring = around[v]
        for u in ring:
            around[u] |= ring
            around[u] -= {u, v}
        for u in sorted(ring.union(*(around[u] for u in ring)) if fill else ring):
            score[u] = added(u) if fill else weight(u)
            heapq.heappush(heap, (score[u], u))
    return EliminationOrder(variables, largest, total)


def eliminate(unary: Sequence[Array], edges: dict[Edge, Array], order: EliminationOrder) -> tuple[float, list[int]]:
    """The optimum and a choice that attains it (inf where no finite one exists)."""
    position = {v: i for i, v in enumerate(order.variables)}
    buckets: list[list[JointTable]] = [[JointTable((v,), cost)] for v, cost in enumerate(unary)]
    rows: dict[int, Array] = {}  # of tables that have a single row or column
    for (u, v), table in edges.items():
        if 1 in table.shape:
            row = rows.setdefault(id(table), table.reshape(-1))
            w = v if len(unary[u]) == 1 else u
            buckets[w].append(JointTable((w,), row))
        else:
            buckets[u if position[u] < position[v] else v].append(JointTable((u, v), table))
    constant = 0.0
    known: dict[tuple[object, ...], Array] = {}  # equal layers are eliminated once; tables live as long as buckets
    for v in order.variables:
        rest = sorted({u for factor in buckets[v] for u in factor.variables} - {v}, key=position.__getitem__)
        place = {u: i for i, u in enumerate((*rest, v))}
        terms = [(tuple([place[u] for u in factor.variables]), factor.table) for factor in buckets[v]]
        key = (*((dims, id(table)) for dims, table in terms),)
        if key not in known:
            known[key] = _combine(terms, len(place)).min(axis=-1)
        table = known[key]
        if rest:
            buckets[rest[0]].append(JointTable(tuple(rest), table))
        else:
            constant += float(table)
    choice = [-1] * len(unary)
    for v in reversed(order.variables):
        cost = np.zeros(len(unary[v]))
        for factor in buckets[v]:
            cost = cost + factor.table[tuple(slice(None) if u == v else choice[u] for u in factor.variables)]
        choice[v] = first_minimum(cost)
    return constant, choice


def _combine(terms: Sequence[tuple[tuple[int, ...], Array]], rank: int) -> Array:
    """The sum of tables, each over some of the dims, as one table over all of them."""
    total: Array = np.zeros((1,) * rank)
    for dims, table in sorted(terms, key=lambda term: term[1].ndim):
        shape = [1] * rank
        for dim, size in zip(dims, table.shape, strict=True):
            shape[dim] = size
        total = total + table.transpose(np.argsort(dims)).reshape(shape)
    return total
