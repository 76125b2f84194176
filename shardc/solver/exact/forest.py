"""A better choice from a choice: exact over a forest of variables at a time, the rest held fixed.

Changing one variable gains little where neighbours must change together. Four of five variables of a deep network can
be picked so that no two of them lie on a cycle of picked ones. The best values of all of these at once take a message
an edge (dynamic programming on a tree), less than half a sweep. The next forest picks others. (Block coordinate
descent over trees, as in Hamze and de Freitas 2004, "From fields to trees".)

    a - b - c             picked: a b c d e, fixed: x
    |   |   |             x is as it was, and costs its row of every table around it
    d   x   e
"""

from __future__ import annotations

from collections.abc import Sequence

from shardc.solver import tuning
from shardc.solver.bounds.bound import Bound
from shardc.solver.pool import first_minimum
from shardc.solver.problem import Array

_GOLDEN = 0.6180339887498949


def descend(bound: Bound, choice: Sequence[int]) -> list[int]:
    """A choice that costs no more, by the tables as given."""
    best, first = list(choice), bound.cost(choice)
    cost, idle = first, 0
    for turn in range(tuning.FORESTS):
        candidate = step(bound, best, turn)
        now = bound.cost(candidate)
        idle = 0 if cost - now > tuning.FOREST_GAIN * (first - now) else idle + 1
        if now < cost:
            best, cost = candidate, now
        if idle == tuning.FOREST_PATIENCE:
            break
    return best


def step(bound: Bound, choice: Sequence[int], turn: int) -> list[int]:
    """The cheapest choice that differs from this one in the variables of one forest, another every turn."""
    return _Forest(bound.plain, _order(len(choice), turn)).best(choice)


def _order(count: int, turn: int) -> list[int]:
    """The order in which variables are picked: in turns a scattered one, and that of the network from some place on."""
    start = ((turn + 1) * _GOLDEN) % 1.0
    if turn % 2:
        place = int(start * count)
        return [*range(place, count), *range(place)]
    return sorted(range(count), key=lambda v: (v * _GOLDEN * (turn + 1) + start) % 1.0)


class _Forest:
    """Variables picked in an order as long as none closes a cycle; `rows` has them each after its parent."""

    def __init__(self, bound: Bound, order: Sequence[int]) -> None:
        self.bound = bound
        self.picked = self._pick(order)
        self.parent: dict[int, tuple[int, int] | None] = {}
        self.rows: list[int] = []
        for root in order:
            if self.picked[root] and root not in self.parent:
                self.parent[root] = None
                self._grow(root)

    def _pick(self, order: Sequence[int]) -> list[bool]:
        tree, picked = list(range(len(order))), [False] * len(order)

        def root(v: int) -> int:
            while tree[v] != v:
                tree[v] = v = tree[tree[v]]
            return v

        for v in order:
            roots = [root(u) for u, _ in self.bound.neighbours[v] if picked[u]]
            if len(set(roots)) == len(roots):
                picked[v] = True
                for other in roots:
                    tree[other] = v
        return picked

    def _grow(self, root: int) -> None:
        stack = [root]
        while stack:
            v = stack.pop()
            self.rows.append(v)
            for u, e in self.bound.neighbours[v]:
                if self.picked[u] and u not in self.parent:
                    self.parent[u] = v, e
                    stack.append(u)

    def best(self, choice: Sequence[int]) -> list[int]:
        """The cheapest choice that differs in picked variables only."""
        flat = self.bound.flat()
        if flat is not None:
            parents = [self.parent[v] or (-1, -1) for v in self.rows]
            return flat.best_of_forest(self.rows, parents, self.picked, choice)
        best, costs = list(choice), {v: self._beside(v, choice) for v in self.rows}
        for v in reversed(self.rows):
            if (up := self.parent[v]) is not None:
                u, e = up
                table = self.bound.given[e]
                assert table is not None
                costs[u] += table.to_second(costs[v]) if v < u else table.to_first(costs[v])
        for v in self.rows:
            cost = costs[v]
            if (up := self.parent[v]) is not None:
                cost = cost + self._row(v, *up, best)
            best[v] = first_minimum(cost)
        return best

    def _beside(self, v: int, choice: Sequence[int]) -> Array:
        """What the values of a variable cost, fixed neighbours included."""
        cost = self.bound.unary[v].copy()
        for u, e in self.bound.neighbours[v]:
            if not self.picked[u]:
                cost += self._row(v, u, e, choice)
        return cost

    def _row(self, v: int, u: int, e: int, choice: Sequence[int]) -> Array:
        """What the values of `v` cost beside the choice for its neighbour `u` over edge `e`."""
        table = self.bound.given[e]
        assert table is not None
        return table.whole[choice[u]] if u < v else table.whole[:, choice[u]]
