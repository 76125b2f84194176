"""Terms over three variables, for cycles on which the pairs alone prove too little.

Let three variables, each worth 0 or 1, pay 1 for every edge of a triangle of which no end is 1, and 0.6 for every 1.
The best choice takes two ones and costs 1.2. The linear program over pairs takes half of each, and proves 0.9. A
*triplet*, which sees all three variables at once, closes that (Sontag et al. 2008, "Tightening LP relaxations for MAP
using message passing").

A triplet over (a, b, c) has no cost of its own. It borrows from the tables of its pairs, `loan_e = lent back -
borrowed`, a reparametrisation of the network:

    T'_e = t_e + sum of loans        the triplet keeps  min_abc (- loan_ab - loan_bc - loan_ac)

No total changes. `Lending` takes all that the pairs have to spare, and hands each a third of what it is worth to the
triplet. The bound cannot fall, for the least of a sum is at least the sum of the least of its parts.

Only a few values of a variable matter to a close bound. A triplet tells `GROUPS - 1` of them apart, those of the
smallest reduced costs, and takes all others as one, at the least that any of them costs. Its loans are the same for all
values of a group, so they are small tables, and it keeps the groups with which it was made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardc.solver import tuning
from shardc.solver.bounds.distinct import Table
from shardc.solver.pool import Mask, min_plus
from shardc.solver.problem import Array, Edge

Triple = tuple[int, int, int]


class Groups:
    """A variable's values in groups: `index` gives the group of each. `labels` are the groups' names: numbers as given,
    of which only those that have a value are counted."""

    def __init__(self, index: NDArray[np.intp]) -> None:
        self.labels, self.index = np.unique(index, return_inverse=True)
        self.order = np.argsort(self.index, kind="stable")
        self.starts = np.searchsorted(self.index[self.order], np.arange(len(self.labels)))

    @staticmethod
    def by(reduced: Array) -> Groups:
        """The values of the smallest reduced costs each alone, the others together."""
        index = np.full(len(reduced), tuning.GROUPS - 1)
        first = np.argsort(reduced, kind="stable")[: tuning.GROUPS - 1]
        index[first] = np.arange(len(first))
        return Groups(index)

    def restricted(self, keep: Mask) -> Groups:
        """The groups of fewer values; their labels are numbers of these groups."""
        return Groups(self.index[keep])

    def least(self, cost: Array) -> Array:
        """The least of every group, along the first dim."""
        return np.minimum.reduceat(cost[self.order], self.starts, axis=0)


def _least(table: Array, rows: Groups, columns: Groups) -> Array:
    return columns.least(rows.least(table).T).T


def spread(loan: Array, rows: Groups, columns: Groups) -> Array:
    """A table over groups as one over values."""
    return loan.take(rows.index, axis=0).take(columns.index, axis=1)


@dataclass
class Triplet:
    """`edges` (places among the tables) and `loans` (tables over groups) in the order ab, bc, ac; `kept` is the part of
    the bound that stays here."""

    variables: Triple
    edges: tuple[int, int, int]
    groups: tuple[Groups, Groups, Groups]
    loans: list[Array]
    kept: float = 0.0

    @staticmethod
    def over(variables: Triple, number: Mapping[Edge, int], groups: Sequence[Groups]) -> Triplet:
        """One that has borrowed nothing yet; `number` gives the place of an edge among the tables."""
        a, b, c = variables
        loans = [np.zeros((len(groups[u].labels), len(groups[v].labels))) for u, v in sides(variables)]
        return Triplet(variables, edges_of(variables, number), (groups[a], groups[b], groups[c]), loans)

    @property
    def grids(self) -> tuple[tuple[Groups, Groups], tuple[Groups, Groups], tuple[Groups, Groups]]:
        """The groups of rows and of columns of every loan."""
        a, b, c = self.groups
        return (a, b), (b, c), (a, c)

    def keep(self) -> None:
        """Set `kept` to what the loans leave."""
        ab, bc, ac = self.loans
        self.kept = -float((ab[:, :, None] + bc[None, :, :] + ac[:, None, :]).max())

    def renumbered(self, number: Mapping[Edge, int]) -> Triplet:
        """The same over tables that stand in other places."""
        return replace(self, edges=edges_of(self.variables, number))

    def restricted(self, groups: tuple[Groups, Groups, Groups]) -> Triplet:
        """The same over fewer values, with the groups of those."""
        part = Triplet(self.variables, self.edges, groups, [], self.kept)
        part.loans = [loan[np.ix_(u.labels, v.labels)] for loan, (u, v) in zip(self.loans, part.grids, strict=True)]
        return part


class Lending:
    """A round of lending. What tables hold beyond their messages is looked up once per pair of groups."""

    def __init__(self, tables: list[Table], messages: Sequence[tuple[Array, Array]]) -> None:
        self.tables, self.messages = tables, messages
        self._open: dict[int, tuple[tuple[Groups, Groups], Array, Array]] = {}  # groups, at first, by now

    def lend(self, triplet: Triplet) -> None:
        """Borrow all that the pairs' tables have to spare, and hand it back in equal parts."""
        spare = [self._spare(e, grid) for e, grid in zip(triplet.edges, triplet.grids, strict=True)]
        ab, bc, ac = (has - loan for has, loan in zip(spare, triplet.loans, strict=True))
        every = ab[:, :, None] + bc[None, :, :]
        every += ac[:, None, :]
        worth = [every.min(axis=2) / 3.0, every.min(axis=0) / 3.0, every.min(axis=1) / 3.0]
        every -= worth[0][:, :, None]
        every -= worth[1][None, :, :]
        every -= worth[2][:, None, :]
        triplet.kept = float(every.min())
        for k, has in enumerate(spare):
            triplet.loans[k] = triplet.loans[k] + (worth[k] - has)
            has[...] = worth[k]

    def close(self) -> None:
        """Enter what has changed into the tables."""
        for e in list(self._open):
            self._enter(e)

    def _spare(self, e: int, grid: tuple[Groups, Groups]) -> Array:
        if e in self._open and self._open[e][0] != grid:
            self._enter(e)
        if e not in self._open:
            to_u, to_v = self.messages[e]
            spare = _least(self.tables[e].whole - to_u[:, None] - to_v[None, :], *grid)
            self._open[e] = grid, spare, spare.copy()
        return self._open[e][2]

    def _enter(self, e: int) -> None:
        grid, first, now = self._open.pop(e)
        self.tables[e] = Table(self.tables[e].whole + spread(now - first, *grid), look=False)


def frustrated(
    unary: Sequence[Array],
    spare: Mapping[Edge, Array],
    groups: Sequence[Groups],
    least: float,
    late: Callable[[], bool],
) -> list[Triple]:
    """Triplets that would raise the bound by more than `least`, those of the most frustrated cycles first.

    `unary` and `spare`: costs rewritten so that all minima are zero. Looked at are cycles through three variables, of
    which every two share a table or a neighbour; a cycle of six becomes four triplets. Once it is `late`, those found
    so far must do.
    """
    small = [group.least(cost) for group, cost in zip(groups, unary, strict=True)]
    joins = _Joins(small, {(u, v): _least(table, groups[u], groups[v]) for (u, v), table in spare.items()})
    cycles: list[tuple[float, Triple, tuple[int | None, ...]]] = []
    for a, b, c in joins.triples():
        if late():
            break
        ways = [joins.ways(a, b), joins.ways(b, c), joins.ways(a, c)]
        for (p, ab), (q, bc), (r, ac) in itertools.product(*ways):
            middles = [m for m in (p, q, r) if m is not None]
            if len({a, b, c, *middles}) < 3 + len(middles):
                continue
            gain = float((ab[:, :, None] + bc[None, :, :] + ac[:, None, :]).min())
            if gain > least:
                cycles.append((gain, (a, b, c), (p, q, r)))
    return _selected(sorted(cycles, key=lambda one: -one[0]))


def _selected(ranked: Sequence[tuple[float, Triple, tuple[int | None, ...]]]) -> list[Triple]:
    """The triplets of every cycle, up to a number."""
    chosen: dict[Triple, None] = {}
    cycles: set[frozenset[int]] = set()
    for _, triple, middles in ranked:
        cycle = frozenset(x for x in (*triple, *middles) if x is not None)
        if cycle in cycles or len(chosen) >= tuning.MAX_TRIPLETS:
            continue
        cycles.add(cycle)
        chosen[triple] = None
        for (u, v), m in zip(sides(triple), middles, strict=True):
            if m is not None:
                x, y, z = sorted((u, v, m))
                chosen[x, y, z] = None
    return list(chosen)


class _Joins:
    """Which variables share a table or a neighbour, and what joining them costs at least."""

    def __init__(self, unary: Sequence[Array], spare: Mapping[Edge, Array]) -> None:
        self.unary, self.spare = unary, spare
        self.around: list[set[int]] = [set() for _ in unary]
        for u, v in spare:
            self.around[u].add(v)
            self.around[v].add(u)
        self.middles: dict[Edge, list[int]] = {pair: [] for pair in spare}
        for m, ring in enumerate(self.around):
            for pair in itertools.combinations(sorted(ring), 2):
                self.middles.setdefault(pair, []).append(m)
        self._ways: dict[Edge, list[tuple[int | None, Array]]] = {}

    def triples(self) -> list[Triple]:
        near: list[set[int]] = [set() for _ in self.unary]
        for u, v in self.middles:
            near[u].add(v)
        return [(a, b, c) for a in range(len(near)) for b in sorted(near[a]) for c in sorted(near[a] & near[b])]

    def ways(self, u: int, v: int) -> list[tuple[int | None, Array]]:
        """The tables between `u < v`: that of their edge (None), or through a neighbour that both share."""
        if (u, v) not in self._ways:
            between = self.spare.get((u, v))
            ways: list[tuple[int | None, Array]] = [] if between is None or not between.any() else [(None, between)]
            for m in self.middles[(u, v)]:
                joined = min_plus(self._table(m, u), self.unary[m], self._table(m, v))
                if joined.any():
                    ways.append((m, joined))
            ways.sort(key=lambda way: -np.count_nonzero(way[1]))
            self._ways[(u, v)] = ways[: tuning.JOINS]
        return self._ways[(u, v)]

    def _table(self, u: int, v: int) -> Array:
        return self.spare[(u, v)] if u < v else self.spare[(v, u)].T


def sides(triple: Triple) -> tuple[Edge, Edge, Edge]:
    """The pairs ab, bc, ac."""
    a, b, c = triple
    return (a, b), (b, c), (a, c)


def edges_of(triple: Triple, number: Mapping[Edge, int]) -> tuple[int, int, int]:
    """The places of its pairs."""
    ab, bc, ac = (number[pair] for pair in sides(triple))
    return ab, bc, ac
