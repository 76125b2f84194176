"""A lower bound by message passing: sequential tree-reweighted sweeps.

TRW-S (Kolmogorov 2006, "Convergent tree-reweighted message passing for energy minimization"), in the form of SRMP
(Kolmogorov 2015, "A new look at reweighted message passing").

Messages `m_eu`, `m_ev` on an edge `e = (u, v)` rewrite the cost without changing any total:

    C_v[x]    = c_v[x] + sum_e m_ev[x]          T_e[x, y] = t_e[x, y] - m_eu[x] - m_ev[y]
    cost(x)   = sum_v C_v[x_v] + sum_e T_e[x_u, x_v]   >=   sum_v min C_v + sum_e min T_e

for *any* finite messages. A sweep visits the variables in order. At `v` it first holds all that its edges can give
(`min_y T_e[., y] = 0`), then hands a share of `C_v` to each edge ahead, whose far end collects it:

    m_ev <- min_x t_e[x, .] - m_eu[x] + C_u[x] / k_u        k_u = max(edges behind u, edges ahead of u)

The bound never falls from sweep to sweep. Write `L` for the bound after a sweep; at any later visit of `v`, a
solution with `x_v = a` costs at least `L + C_v[a] - min C_v`: the *reduced cost*, by which values are deleted when
an incumbent is known.

Needs finite unary costs and a finite entry in every row and column of every table; tables may contain inf
elsewhere. Then every message is finite and no inf is ever subtracted from inf.

The best such bound is that of the linear program over the pairs, and frustrated cycles keep it below the optimum.
Terms over three variables (`triplets.py`) close that: they borrow from the tables of their pairs and lend back, and
what they keep counts as part of the bound.

    costs [0, 1] and [0, 1], table [[9, 0], [0, 9]]     minima prove 0; after a sweep they prove 1, which is the optimum
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shardc.solver import tuning
from shardc.solver.bounds.distinct import Table
from shardc.solver.bounds.triplets import Groups, Lending, Triple, Triplet, edges_of, sides, spread
from shardc.solver.pool import Mask, Restriction, first_minimum
from shardc.solver.problem import Array, Edge
from shardc.solver.proof.certificate import Certificate

if TYPE_CHECKING:
    from shardc.solver.bounds.flat import Flat

Place = NDArray[np.intp]


class Bound:
    """Messages over a network, improved sweep by sweep. `lower` is the best bound proved so far, `current` that of the
    messages as they are: it may be less after pairs were added, and reduced costs count from there.

    `chords` are pairs without a table of their own, over which triplets meet. Messages that tables give `roughly`, in
    half the digits, prove what a certificate of them does, no more: `lower` may be off by the rounding."""

    def __init__(
        self, unary: Sequence[Array], edges: Mapping[Edge, Array | Table], chords: Sequence[Edge] = ()
    ) -> None:
        self.unary = list(unary)
        self.ends = sorted({*edges, *chords})
        self.number = {edge: e for e, edge in enumerate(self.ends)}
        made: dict[int, Table] = {}
        for table in edges.values():
            if id(table) not in made:
                made[id(table)] = table if isinstance(table, Table) else Table(table)
        # as given, None for a chord; and less what triplets have borrowed
        self.given = [made[id(edges[e])] if e in edges else None for e in self.ends]
        self.tables = [table or self._nothing(e) for e, table in zip(self.ends, self.given, strict=True)]
        self.triplets: list[Triplet] = []
        self.behind: list[list[int]] = [[] for _ in unary]
        self.ahead: list[list[int]] = [[] for _ in unary]
        for e, (u, v) in enumerate(self.ends):
            self.ahead[u].append(e)
            self.behind[v].append(e)
        self.to_first = [np.zeros(len(unary[u])) for u, _ in self.ends]
        self.to_second = [np.zeros(len(unary[v])) for _, v in self.ends]
        self.share = [1.0 / max(len(a), len(b), 1) for a, b in zip(self.ahead, self.behind, strict=True)]
        self.lower = self.current = -np.inf
        self._short: bool | None = None
        self._flattened: tuple[list[Table], Flat] | None = None  # of which tables, and as what

    def starting(self, start: Certificate) -> "Bound":
        """The same network with the messages and triplets of a certificate, and one pass each way."""
        pairs = {pair for lender in start.triplets for pair in sides(lender.variables)}
        more = self._with_chords(pairs - self.number.keys())
        for edge, (to_u, to_v) in start.messages.items():
            e = more.number[edge]
            more.to_first[e], more.to_second[e] = to_u, to_v
        groups: dict[int, Groups] = {}
        for lender in start.triplets:
            a, b, c = (groups.setdefault(id(index), Groups(index)) for index in lender.groups)
            edges = edges_of(lender.variables, more.number)
            more.triplets.append(Triplet(lender.variables, edges, (a, b, c), list(lender.loans)))
            more.triplets[-1].keep()
        more._enter([t.loans for t in more.triplets])
        more._passes()
        return more

    def sweep(self) -> float:
        """One pass forward and one backward, and one round of lending before; returns the bound."""
        if self.triplets:
            messages = self.messages()
            lending = Lending(self.tables, [messages[edge] for edge in self.ends])
            for triplet in self.triplets:
                lending.lend(triplet)
            lending.close()
        return self._passes()

    def _passes(self) -> float:
        self._forward()
        return self._backward(None)

    def reduced_costs(self) -> list[Array]:
        """One more pass each way, noting `C_v - min C_v` on the way back; valid with `current` *before* the call."""
        reduced: list[Array] = [cost for cost in self.unary]
        self._forward()
        self._backward(reduced)
        return reduced

    def rewritten(self, v: int) -> Array:
        """`C_v`."""
        cost = self.unary[v].copy()
        for e in self.behind[v]:
            cost += self.to_second[e]
        for e in self.ahead[v]:
            cost += self.to_first[e]
        return cost

    def flat(self) -> "Flat | None":
        """The network for passes in compiled code; None for small ones."""
        if self._short is None:
            self._short = (
                len(self.ends) + sum(table.small.size for table in self.tables) / tuning.ENTRIES_PER_EDGE
                < tuning.COMPILED_EDGES
            )
        if self._short:
            return None
        if self._flattened is None or any(a is not b for a, b in zip(self._flattened[0], self.tables, strict=True)):
            from shardc.solver.bounds.flat import Flat

            flat = Flat.of(self.unary, self.ends, self.tables, self.share, self.ahead, self.behind)
            self._flattened = [*self.tables], flat
        return self._flattened[1]

    def _forward(self) -> None:
        flat = self.flat()
        if flat is not None:
            self.to_second = flat.forward(self.to_first, self.to_second)
            return
        for u in range(len(self.unary)):
            if not self.ahead[u]:
                continue
            cost = self.rewritten(u)
            cost *= self.share[u]
            for e in self.ahead[u]:
                message = self.tables[e].to_second(cost - self.to_first[e])
                message -= message.min()
                self.to_second[e] = message

    def _backward(self, reduced: list[Array] | None) -> float:
        """Every constant taken out is kept in the bound; what stays behind is nonnegative with minimum zero."""
        flat = self.flat()
        if flat is not None:
            lower, self.to_first, costs = flat.backward(self.to_first, self.to_second)
            if reduced is not None:
                reduced[:] = costs
        else:
            lower = self._backward_by_edges(reduced)
        lower += sum(triplet.kept for triplet in self.triplets)
        self.current = lower
        self.lower = max(self.lower, lower)
        return lower

    def _backward_by_edges(self, reduced: list[Array] | None) -> float:
        lower = 0.0
        for v in range(len(self.unary) - 1, -1, -1):
            cost = self.rewritten(v)
            least = float(cost.min())
            lower += least
            cost -= least
            if reduced is not None:
                reduced[v] = cost.copy()
            cost *= self.share[v]
            for e in self.behind[v]:
                message = self.tables[e].to_first(cost - self.to_second[e])
                least = float(message.min())
                lower += least
                message -= least
                self.to_first[e] = message
        return lower

    def messages(self) -> dict[Edge, tuple[Array, Array]]:
        """The messages `(m_eu, m_ev)` whose sum of minima is the bound of the sweep just made.

        What is constant stays with the variables: between triplets, which borrow all that a pair has to spare,
        constants would grow."""
        costs = (self.rewritten(v) for v in range(len(self.unary)))
        shares = [(cost - cost.min()) * share for cost, share in zip(costs, self.share, strict=True)]
        return {(u, v): (self.to_first[e].copy(), self.to_second[e] - shares[v]) for e, (u, v) in enumerate(self.ends)}

    def tables_by_edge(self) -> dict[Edge, Array]:
        """The tables as given."""
        return {edge: table.whole for edge, table in zip(self.ends, self.given, strict=True) if table is not None}

    def with_triplets(self, triples: Sequence[Triple], groups: Sequence[Groups], upper: float) -> "Bound":
        """The same bound with more triplets, all with these groups. Entries that no solution cheaper than `upper` can
        have are cut off, well above what proves that: what is lent must be finite."""
        pairs = {pair for triple in triples for pair in sides(triple)}
        more = self._with_chords(pairs - self.number.keys())
        more._passes()  # variables with new pairs hand out smaller shares
        ceiling = tuning.LOAN_CEILING * (upper - more.current)
        for (u, v), (to_u, to_v) in more.messages().items():
            if (u, v) in pairs:
                e, moved = more.number[(u, v)], to_u[:, None] + to_v[None, :]
                least = float((more.tables[e].whole - moved).min())
                more.tables[e] = Table(np.minimum(more.tables[e].whole, moved + (least + ceiling)), look=False)
        more.triplets += [Triplet.over(triple, more.number, groups) for triple in triples]
        return more

    def _with_chords(self, chords: Iterable[Edge]) -> "Bound":
        """The same with more pairs that have no table."""
        old = [e for e, table in zip(self.ends, self.given, strict=True) if table is None]
        given = {edge: table for edge, table in zip(self.ends, self.given, strict=True) if table is not None}
        more = Bound(self.unary, given, [*old, *chords])
        for edge, e in self.number.items():
            n = more.number[edge]
            more.tables[n], more.to_first[n], more.to_second[n] = self.tables[e], self.to_first[e], self.to_second[e]
        more.triplets = [triplet.renumbered(more.number) for triplet in self.triplets]
        more.lower, more.current = self.lower, -np.inf
        return more

    def _nothing(self, edge: Edge) -> Table:
        return Table(np.zeros((len(self.unary[edge[0]]), len(self.unary[edge[1]]))))

    def rewritten_network(self) -> tuple[float, list[Array], dict[Edge, Array]]:
        """The same network in costs rewritten by a fresh sweep: a constant, and terms whose minima are zero."""
        self.sweep()
        unary = [cost.copy() for cost in self.unary]
        edges = self.tables_by_edge()
        for (u, v), (to_u, to_v) in self.messages().items():
            if (u, v) not in edges:
                continue
            unary[u] += to_u
            unary[v] += to_v
            edges[(u, v)] = edges[(u, v)] - to_u[:, None] - to_v[None, :]
        least = [float(t.min()) for t in unary], {e: float(t.min()) for e, t in edges.items()}
        constant = sum(least[0]) + sum(least[1].values())
        return (
            constant,
            [cost - low for cost, low in zip(unary, least[0], strict=True)],
            {e: table - least[1][e] for e, table in edges.items()},
        )

    def spare(self) -> tuple[list[Array], dict[Edge, Array]]:
        """What is left of unary costs and of tables beyond their messages and loans; all minima are zero."""
        self.sweep()
        unary = [cost.copy() for cost in self.unary]
        edges: dict[Edge, Array] = {}
        for e, ((u, v), (to_u, to_v)) in enumerate(self.messages().items()):
            unary[u] += to_u
            unary[v] += to_v
            table = self.tables[e].whole - to_u[:, None] - to_v[None, :]
            edges[(u, v)] = table - table.min()
        return [cost - cost.min() for cost in unary], edges

    def decode(self, counts: Sequence[int] | None = None) -> list[int]:
        """A choice: each variable in order, given those before it and the messages of those after it. With `counts`, of
        its so many first values."""
        choice: list[int] = []
        for v in range(len(self.unary)):
            cost = self.unary[v].copy()
            if counts is not None:
                cost[counts[v] :] = np.inf
            for e in self.behind[v]:
                cost += self.tables[e].whole[choice[self.ends[e][0]]]
            for e in self.ahead[v]:
                cost += self.to_first[e]
            choice.append(first_minimum(cost))
        return choice

    @cached_property
    def plain(self) -> "Bound":
        """The network as given, without chords and loans."""
        given = {edge: table for edge, table in zip(self.ends, self.given, strict=True) if table is not None}
        return Bound(self.unary, given) if self.triplets or len(given) < len(self.ends) else self

    @cached_property
    def neighbours(self) -> list[list[tuple[int, int]]]:
        """Per variable its neighbours, of which they share a table, with the number of the edge."""
        neighbours: list[list[tuple[int, int]]] = [[] for _ in self.unary]
        for e, (u, v) in enumerate(self.ends):
            if self.given[e] is not None:
                neighbours[u].append((v, e))
                neighbours[v].append((u, e))
        return neighbours

    def cost(self, choice: Sequence[int]) -> float:
        total = sum(float(cost[choice[v]]) for v, cost in enumerate(self.unary))
        given = zip(self.ends, self.given, strict=True)
        return total + sum(float(table.whole[choice[u], choice[v]]) for (u, v), table in given if table is not None)

    def restricted(self, keep: Sequence[Mask]) -> "Bound":
        """The same messages over fewer values; equal tables stay shared."""
        part = Restriction(keep)
        edges = {(u, v): part(table, u, v) for (u, v), table in self.tables_by_edge().items()}
        chords = [e for e, table in zip(self.ends, self.given, strict=True) if table is None]
        small = Bound([cost[k] for cost, k in zip(self.unary, keep, strict=True)], edges, chords)
        for e, (u, v) in enumerate(self.ends):
            if self.tables[e] is not self.given[e]:
                small.tables[e] = Table(part(self.tables[e].whole, u, v), look=False)
        small.to_first = [m[keep[u]] for m, (u, _) in zip(self.to_first, self.ends, strict=True)]
        small.to_second = [m[keep[v]] for m, (_, v) in zip(self.to_second, self.ends, strict=True)]
        groups: dict[tuple[int, int], Groups] = {}

        def fewer(group: Groups, v: int) -> Groups:
            key = (id(group), v)
            if key not in groups:
                groups[key] = group.restricted(keep[v])
            return groups[key]

        small.triplets = [t.restricted(_each(fewer, t)) for t in self.triplets]
        small.lower, small.current = self.lower, self.current
        return small

    def gathered(self, keep: Sequence[Mask]) -> tuple["Bound", list[Place], dict[Edge, tuple[Array, Array]]]:
        """A smaller network that proves as much: the values of a variable that are not kept become one, the last, which
        costs as little as any of them. For a bound without triplets.

        Returned with the place of every value in it, and the messages up to here, which its costs contain: messages for
        the smaller network, added to those, prove the same for this one."""
        assert not self.triplets
        messages = self.messages()
        places = [np.where(mask, np.cumsum(mask) - 1, np.count_nonzero(mask)) for mask in keep]
        unary = [cost.copy() for cost in self.unary]
        edges: dict[Edge, Array] = {}
        for e, (u, v) in enumerate(self.ends):
            to_u, to_v = messages[u, v]
            unary[u] += to_u
            unary[v] += to_v
            moved = self.tables[e].whole - to_u[:, None] - to_v[None, :]
            edges[u, v] = _gathered(_gathered(moved, keep[u]).T, keep[v]).T
        small = Bound([_gathered(cost, mask) for cost, mask in zip(unary, keep, strict=True)], edges)
        small.lower = self.lower
        return small, places, messages

    def _enter(self, changes: Sequence[Sequence[Array]]) -> None:
        """Enter changes of the triplets' loans into the tables."""
        sums: dict[tuple[int, int, int], tuple[Groups, Groups, Array]] = {}
        for triplet, change in zip(self.triplets, changes, strict=True):
            for loan, e, (rows, columns) in zip(change, triplet.edges, triplet.grids, strict=True):
                key = (e, id(rows), id(columns))
                sums[key] = rows, columns, sums[key][2] + loan if key in sums else loan
        for (e, _, _), (rows, columns, loan) in sums.items():
            self.tables[e] = Table(self.tables[e].whole + spread(loan, rows, columns), look=False)


def _gathered(cost: Array, keep: Mask) -> Array:
    """The kept entries along the first dim, then the least of the others."""
    if keep.all():
        return cost
    return np.concatenate([cost[keep], cost[~keep].min(axis=0, keepdims=True)])


def _each(regrouped: Callable[[Groups, int], Groups], triplet: Triplet) -> tuple[Groups, Groups, Groups]:
    (a, b, c), (x, y, z) = triplet.groups, triplet.variables
    return regrouped(a, x), regrouped(b, y), regrouped(c, z)
