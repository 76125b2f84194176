"""Presolve: shrink the network exactly before any search.

Four rewrites, none of which changes the optimum:

* *consistency*: a value without a finite partner across some edge can never be used, delete it (arc consistency);
* *dominance*: value `a` of `v` is useless when some `b` is never dearer, whatever the neighbours do: `c[b] - c[a] +
  sum_e max_y (t_e[b, y] - t_e[a, y]) <= 0` (dead-end elimination, Goldstein 1994). The relation is transitive, so
  deleting one at a time is safe;
* *substitution*: a variable with one value left adds a row of each table to its neighbours;
* *contraction*: a variable `k` with at most two neighbours is minimised out: `min_k c[k]` is a constant,
  `c_i[x] += min_k t_ik[x, k] + c[k]`, and `t_ij[x, y] += min_k t_ik[x, k] + c[k] + t_kj[k, y]`, a min-plus product.

    i -[1 2]- k -[0 5]- j    with c_k = [0 1]     ->     i -[1 3]- j      first entry: min(1 + 0 + 0, 2 + 1 + 4)
       [3 0]     [4 0]                                      [3 1]

All arrays live in a `Pool`, which interns them by content, and every rewrite is remembered by the numbers of its
operands, so equal layers are rewritten once. Only sums and minima of values in `(-inf, inf]` are formed, so NaN
cannot arise.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardc.errors import InfeasibleError
from shardc.solver import tuning
from shardc.solver.pool import Mask, Oriented, Pool, first_minimum, min_plus, undominated
from shardc.solver.problem import Array, Edge, Problem

Values = NDArray[np.intp]


class Worklist:
    """A set that hands out its smallest element."""

    def __init__(self, items: set[int]) -> None:
        self._heap = sorted(items)
        self._waiting = set(items)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, items: set[int]) -> None:
        for item in items - self._waiting:
            heapq.heappush(self._heap, item)
        self._waiting |= items

    def pop(self) -> int:
        item = heapq.heappop(self._heap)
        self._waiting.discard(item)
        return item


@dataclass(frozen=True)
class Removal:
    """A contracted variable, with what is needed to choose its value once its neighbours are known."""

    variable: int
    values: Values
    unary: int
    links: tuple[tuple[int, Values, Oriented], ...]  # neighbour, its values at that time, table (variable, neighbour)


@dataclass(frozen=True)
class Core:
    """What is left, renumbered; `variables[i]` and `values[i]` lead back."""

    unary: list[Array]
    edges: dict[Edge, Array]
    variables: list[int]
    values: list[Values]

    def nearest(self, choice: Sequence[int]) -> list[int]:
        """A choice of the whole network as one of the core. For a value that is gone stands the next that is left."""
        places = (np.searchsorted(values, choice[v]) for v, values in zip(self.variables, self.values, strict=True))
        return [min(int(x), len(values) - 1) for x, values in zip(places, self.values, strict=True)]


class ReducedNetwork:
    """The mutable network that the rewrites work on."""

    def __init__(self, problem: Problem) -> None:
        self.pool = Pool()
        self.names = problem.names
        self.unary: list[int] = [self.pool.add_shared(cost) for cost in problem.unary]
        self.values: list[Values] = [np.arange(len(cost)) for cost in problem.unary]
        self.tables: dict[Edge, int] = {edge: self.pool.add_shared(table) for edge, table in problem.edges.items()}
        self.neighbours: list[set[int]] = [set() for _ in problem.unary]
        for u, v in self.tables:
            self.neighbours[u].add(v)
            self.neighbours[v].add(u)
        self.alive: list[bool] = [True] * len(self.unary)
        self.removals: list[Removal] = []
        self.constant = 0.0
        self._masks: dict[tuple[object, ...], Mask] = {}

    def shrink(self) -> None:
        """Apply every rewrite until none applies. Raises InfeasibleError when a domain runs empty."""
        touched = set(range(len(self.unary)))
        while touched:
            changed = self.make_consistent(touched)
            changed |= self.drop_dominated(touched | changed)
            touched = {v for v in changed | self.contract(touched | changed) if self.alive[v]}
        if math.isinf(self.constant):
            raise InfeasibleError("the constraints leave no feasible plan")

    def core(self) -> Core:
        variables = [v for v in range(len(self.unary)) if self.alive[v]]
        number = {v: i for i, v in enumerate(variables)}
        edges = {(number[u], number[v]): self.pool.arrays[t] for (u, v), t in sorted(self.tables.items())}
        unary = [self.pool.arrays[self.unary[v]] for v in variables]
        return Core(unary, edges, variables, [self.values[v] for v in variables])

    def expand(self, core: Core, choice: list[int]) -> list[int]:
        """A choice for the core, extended optimally to all variables, in the values of the problem."""
        full = [-1] * len(self.unary)
        for i, v in enumerate(core.variables):
            full[v] = int(core.values[i][choice[i]])
        for removal in reversed(self.removals):
            cost = self.pool.arrays[removal.unary]
            for neighbour, values, oriented in removal.links:
                cost = cost + self.pool.read(oriented)[:, int(np.searchsorted(values, full[neighbour]))]
            full[removal.variable] = int(removal.values[first_minimum(cost)])
        return full

    def make_consistent(self, variables: set[int]) -> set[int]:
        """Delete values without finite partners, starting from these variables; return the variables that changed."""
        changed: set[int] = set()
        queue = Worklist(variables)
        while queue:
            v = queue.pop()
            if not self.alive[v]:
                continue
            keep = self._consistent(v)
            if not keep.any():
                raise InfeasibleError(f"no value of {self.names[v]!r} is compatible with its neighbours")
            if not keep.all():
                self.restrict(v, keep)
                changed.add(v)
                queue.add(self.neighbours[v])
        return changed

    def _consistent(self, v: int) -> Mask:
        """Which values of `v` have a finite cost and, across each edge, a finite partner."""
        keep = np.isfinite(self.pool.arrays[self.unary[v]])
        for u in self.neighbours[v]:
            oriented = self.table(v, u)
            if self.pool.finite(oriented[0]) and self.pool.finite(self.unary[u]):
                continue
            key = ("partner", oriented, self.unary[u])
            if key not in self._masks:
                table = self.pool.read(oriented) + self.pool.arrays[self.unary[u]]
                self._masks[key] = np.asarray(np.isfinite(table).any(axis=1))
            keep = keep & self._masks[key]
        return keep

    def drop_dominated(self, variables: set[int]) -> set[int]:
        """Delete dominated values of these variables and, where that changed something, of their neighbours."""
        changed: set[int] = set()
        queue = Worklist(variables)
        while queue:
            v = queue.pop()
            if not self.alive[v]:
                continue
            keep = self._undominated(v)
            if not keep.all():
                self.restrict(v, keep)
                changed.add(v)
                queue.add(self.neighbours[v])
        return changed

    def _undominated(self, v: int) -> Mask:
        tables = sorted(self.table(v, u) for u in self.neighbours[v])
        key = ("dominance", self.unary[v], *tables)
        if key not in self._masks:
            self._masks[key] = undominated(self.pool.arrays[self.unary[v]], [self.pool.read(t) for t in tables])
        return self._masks[key]

    def contract(self, variables: set[int]) -> set[int]:
        """Minimise out variables with one value or at most two neighbours; return those whose tables changed."""
        changed: set[int] = set()
        queue = Worklist(variables)
        while queue:
            v = queue.pop()
            if not self.alive[v]:
                continue
            if self._contractible(v):
                around = self.neighbours[v]
                self._remove(v)
                changed |= around
                queue.add(around)
        return changed

    def _contractible(self, v: int) -> bool:
        if len(self.values[v]) == 1 or len(self.neighbours[v]) < 2:
            return True
        if len(self.neighbours[v]) > 2:
            return False
        a, b = self.neighbours[v]
        return len(self.values[a]) * len(self.values[b]) * len(self.values[v]) <= tuning.PRODUCT_ENTRIES

    def _remove(self, v: int) -> None:
        pool, around, cost = self.pool, sorted(self.neighbours[v]), self.unary[v]
        links = tuple((u, self.values[u], self.table(v, u)) for u in around)
        self.removals.append(Removal(v, self.values[v], cost, links))
        if not around:
            self.constant += float(pool.arrays[cost].min())
        elif len(self.values[v]) == 1:
            self.constant += float(pool.arrays[cost][0])
            for u, _, t in links:
                self._add_unary(u, pool.derive(("row", t), lambda t=t: pool.read(t)[0]))
        elif len(around) == 1:
            t = links[0][2]
            message = pool.derive(("message", t, cost), lambda: (pool.read(t) + pool.arrays[cost][:, None]).min(axis=0))
            self._add_unary(around[0], message)
        else:
            s, t = links[0][2], links[1][2]
            key = ("product", s, cost, t)
            product = pool.derive(key, lambda: min_plus(pool.read(s), pool.arrays[cost], pool.read(t)))
            self._add_table(around[0], around[1], product)
        for u in around:
            self.neighbours[u].discard(v)
            del self.tables[(u, v) if u < v else (v, u)]
        self.neighbours[v], self.alive[v] = set(), False

    def _add_unary(self, v: int, number: int) -> None:
        pool, old = self.pool, self.unary[v]
        self.unary[v] = pool.derive(("sum", old, number), lambda: pool.arrays[old] + pool.arrays[number])

    def _add_table(self, u: int, v: int, number: int) -> None:
        pool, old = self.pool, self.tables.get((u, v))
        if old is not None:
            number = pool.derive(("sum", old, number), lambda n=number: pool.arrays[old] + pool.arrays[n])
        self.tables[(u, v)] = number
        self.neighbours[u].add(v)
        self.neighbours[v].add(u)

    def table(self, u: int, v: int) -> Oriented:
        """The table between two neighbours with `u` along its rows."""
        return (self.tables[(u, v)], False) if u < v else (self.tables[(v, u)], True)

    def restrict(self, v: int, keep: Mask) -> None:
        """Keep only some values of a variable, in its unary cost and in every table around it."""
        pool, mark = self.pool, keep.tobytes()
        old = self.unary[v]
        self.unary[v] = pool.derive(("keep", old, mark), lambda: pool.arrays[old][keep])
        self.values[v] = self.values[v][keep]
        for u in self.neighbours[v]:
            edge = (u, v) if u < v else (v, u)
            t, axis = self.tables[edge], 1 if u < v else 0
            self.tables[edge] = pool.derive(
                ("keep", t, axis, mark), lambda t=t, axis=axis: np.compress(keep, pool.arrays[t], axis=axis)
            )
