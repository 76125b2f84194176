"""A lower bound by message passing: sequential tree-reweighted sweeps (TRW-S, in the form of SRMP).

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
"""

from collections.abc import Mapping, Sequence

import numpy as np

from shardc.solver.pool import Mask, first_minimum
from shardc.solver.problem import Array, Edge
from shardc.solver.triplets import Groups, Triplet, lend


class Bound:
    """Messages over a network, improved sweep by sweep. `lower` is the best bound proved so far.

    `chords` are pairs without a table of their own, over which triplets meet."""

    def __init__(self, unary: Sequence[Array], edges: dict[Edge, Array], chords: Sequence[Edge] = ()) -> None:
        self.unary = list(unary)
        self.ends = sorted({*edges, *chords})
        self.number = {edge: e for e, edge in enumerate(self.ends)}
        turned: dict[int, tuple[Array, Array]] = {}
        for table in edges.values():
            if id(table) not in turned:
                turned[id(table)] = (np.ascontiguousarray(table), np.ascontiguousarray(table.T))
        # (rows are u, rows are v) of e = (u, v): as given, None for a chord; and less what triplets have borrowed
        self.given = [turned[id(edges[e])] if e in edges else None for e in self.ends]
        self.tables = [pair or self._nothing(e) for e, pair in zip(self.ends, self.given, strict=True)]
        self.triplets: list[Triplet] = []
        self.behind: list[list[int]] = [[] for _ in unary]
        self.ahead: list[list[int]] = [[] for _ in unary]
        for e, (u, v) in enumerate(self.ends):
            self.ahead[u].append(e)
            self.behind[v].append(e)
        self.to_first = [np.zeros(len(unary[u])) for u, _ in self.ends]
        self.to_second = [np.zeros(len(unary[v])) for _, v in self.ends]
        self.share = [1.0 / max(len(a), len(b), 1) for a, b in zip(self.ahead, self.behind, strict=True)]
        self.lower = -np.inf

    def begin(self, messages: Mapping[Edge, tuple[Array, Array]]) -> None:
        """Start from messages such as `messages` gives."""
        for edge, (to_u, to_v) in messages.items():
            e = self.number[edge]
            self.to_first[e], self.to_second[e] = to_u, to_v

    def sweep(self) -> float:
        """One pass forward and one backward, and one round of lending before; returns the bound."""
        if self.triplets:
            messages = self.messages()
            for triplet in self.triplets:
                lend(triplet, self.tables, [messages[self.ends[e]] for e in triplet.edges])
        self._forward()
        return self._backward(None)

    def reduced_costs(self) -> list[Array]:
        """One more pass each way, noting `C_v - min C_v` on the way back; valid with `lower` *before* the call."""
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

    def _forward(self) -> None:
        for u in range(len(self.unary)):
            if not self.ahead[u]:
                continue
            cost = self.rewritten(u)
            cost *= self.share[u]
            for e in self.ahead[u]:
                message = (self.tables[e][0] + (cost - self.to_first[e])[:, None]).min(axis=0)
                message -= message.min()
                self.to_second[e] = message

    def _backward(self, reduced: list[Array] | None) -> float:
        """Every constant taken out is kept in the bound; what stays behind is nonnegative with minimum zero."""
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
                message = (self.tables[e][1] + (cost - self.to_second[e])[:, None]).min(axis=0)
                least = float(message.min())
                lower += least
                message -= least
                self.to_first[e] = message
        lower += sum(triplet.kept for triplet in self.triplets)
        self.lower = max(self.lower, lower)
        return lower

    def messages(self) -> dict[Edge, tuple[Array, Array]]:
        """The messages `(m_eu, m_ev)` whose sum of minima is the bound of the sweep just made."""
        shares = [self.rewritten(v) * self.share[v] for v in range(len(self.unary))]
        return {(u, v): (self.to_first[e].copy(), self.to_second[e] - shares[v]) for e, (u, v) in enumerate(self.ends)}

    def tables_by_edge(self) -> dict[Edge, Array]:
        """The tables as given."""
        return {edge: pair[0] for edge, pair in zip(self.ends, self.given, strict=True) if pair is not None}

    def with_triplets(
        self, triples: Sequence[tuple[int, int, int]], groups: Sequence[Groups], ceiling: float
    ) -> "Bound":
        """The same bound with more triplets, all with these groups. Entries whose rewritten cost exceeds `ceiling` are
        cut off there, which is sound if no better solution can have them: what is lent must be finite."""
        pairs = {pair for a, b, c in triples for pair in ((a, b), (b, c), (a, c))}
        chords = [e for e, pair in zip(self.ends, self.given, strict=True) if pair is None]
        more = Bound(self.unary, self.tables_by_edge(), [*chords, *(pairs - self.number.keys())])
        for e, edge in enumerate(more.ends):
            old = self.number.get(edge)
            if old is not None:
                more.tables[e], more.to_first[e], more.to_second[e] = (
                    self.tables[old], self.to_first[old], self.to_second[old],
                )  # fmt: skip
        for (u, v), (to_u, to_v) in more.messages().items():
            if (u, v) in pairs:
                e = more.number[(u, v)]
                table = np.minimum(more.tables[e][0], to_u[:, None] + to_v[None, :] + ceiling)
                more.tables[e] = (table, np.ascontiguousarray(table.T))
        more.triplets = [t.renumbered(more.number, groups) for t in self.triplets]
        more.triplets += [Triplet.over(triple, more.number, groups) for triple in triples]
        more.lower = self.lower
        return more

    def _nothing(self, edge: Edge) -> tuple[Array, Array]:
        shape = (len(self.unary[edge[0]]), len(self.unary[edge[1]]))
        return np.zeros(shape), np.zeros(shape[::-1])

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

    def decode(self) -> list[int]:
        """A choice: each variable in order, given those before it and the messages of those after it."""
        choice: list[int] = []
        for v in range(len(self.unary)):
            cost = self.unary[v].copy()
            for e in self.behind[v]:
                cost += self.tables[e][0][choice[self.ends[e][0]]]
            for e in self.ahead[v]:
                cost += self.to_first[e]
            choice.append(first_minimum(cost))
        return choice

    def improve(self, choice: list[int], rounds: int = 5) -> list[int]:
        """Coordinate descent from a choice."""
        choice = list(choice)
        for _ in range(rounds):
            moved = False
            for v in range(len(self.unary)):
                cost = self.unary[v].copy()
                for e in self.behind[v]:
                    pair = self.given[e]
                    cost += pair[0][choice[self.ends[e][0]]] if pair else 0.0
                for e in self.ahead[v]:
                    pair = self.given[e]
                    cost += pair[1][choice[self.ends[e][1]]] if pair else 0.0
                best = first_minimum(cost)
                if cost[best] < cost[choice[v]]:
                    choice[v], moved = best, True
            if not moved:
                break
        return choice

    def cost(self, choice: Sequence[int]) -> float:
        total = sum(float(cost[choice[v]]) for v, cost in enumerate(self.unary))
        return total + sum(float(table[choice[u], choice[v]]) for (u, v), table in self.tables_by_edge().items())

    def restricted(self, keep: Sequence[Mask]) -> "Bound":
        """The same messages over fewer values; equal tables stay shared."""
        cut: dict[tuple[int, bytes, bytes], Array] = {}

        def part(table: Array, u: int, v: int) -> Array:
            key = (id(table), keep[u].tobytes(), keep[v].tobytes())
            if key not in cut:
                cut[key] = table[np.ix_(keep[u], keep[v])]
            return cut[key]

        edges = {(u, v): part(table, u, v) for (u, v), table in self.tables_by_edge().items()}
        chords = [e for e, pair in zip(self.ends, self.given, strict=True) if pair is None]
        small = Bound([cost[k] for cost, k in zip(self.unary, keep, strict=True)], edges, chords)
        for e, (u, v) in enumerate(self.ends):
            if self.tables[e] is not self.given[e]:
                table = part(self.tables[e][0], u, v)
                small.tables[e] = (table, np.ascontiguousarray(table.T))
        small.to_first = [m[keep[u]] for m, (u, _) in zip(self.to_first, self.ends, strict=True)]
        small.to_second = [m[keep[v]] for m, (_, v) in zip(self.to_second, self.ends, strict=True)]
        small.triplets = [triplet.restricted(keep) for triplet in self.triplets]
        small.lower = self.lower
        return small
