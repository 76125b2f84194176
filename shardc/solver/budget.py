"""The cheapest choice that never holds more than a bound: prices on memory, and what they prove.

At a price of `p_t` seconds a byte held at position t, the cheapest choice of the priced network proves that every
choice within the bound costs at least

    min over x of  cost(x) + sum_t p_t * (held_t(x) - bound)

(Lagrangian relaxation; Everett 1963, "Generalized Lagrange multiplier method"). Every choice found is a line in a
linear program over the prices, whose optimum is where to ask next (Kelley 1960, "The cutting-plane method"). Only the
positions at which some choice held the most have a price.

Prices alone leave a gap: where a model has many equal layers, all of them change at the same price, though the bound
may only ask it of some. So two choices, one within the bound and one cheaper, are merged: what they differ in falls
into parts that share no table, and each part may be taken from either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from shardc.errors import InfeasibleError
from shardc.printing import in_bytes
from shardc.solver.holdings import Holdings
from shardc.solver.problem import TOLERANCE, Array, Problem, evaluate
from shardc.solver.solve import Solution, solve

if TYPE_CHECKING:
    from shardc.solver.milp import Limit

_CLOSE = 5e-4  # relative gap at which the search ends
_ROUNDS = 40
_MODEST, _RISE, _RICH = 0.2, 4.0, 1e4
"""Ceilings of prices until something fits, the first, the factor, and the last: so many times the cost of the whole for
the whole bound."""
_SMALL, _MILP_UNITS = 20_000, 1e3  # pairs of values that are branched over; the cost in the units given to HiGHS
_HOPELESS = 3.0  # what is proved for a bound that nothing fits, as a multiple of the dearest choice known


@dataclass(frozen=True)
class Within:
    """A choice within the bound. `prices` per position (seconds a byte) prove `lower_bound`, by the lower bound of the
    priced problem; `held` are the bytes at every position."""

    choice: list[int]
    cost: float
    lower_bound: float
    held: Array
    prices: dict[int, float] = field(default_factory=dict[int, float])


@dataclass(frozen=True)
class _Point:
    choice: list[int]
    cost: float
    held: Array

    @property
    def peak(self) -> float:
        return float(self.held.max(initial=0.0))


class Frontier:
    """The trade of cost against memory, as far as it was looked at: what was found for one bound serves the next."""

    def __init__(self, problem: Problem, holdings: Holdings) -> None:
        self.problem, self.holdings = problem, holdings
        self.points: list[_Point] = []
        self.proofs: list[tuple[dict[int, float], float]] = []  # prices, and the least cost at these
        self.finished: dict[float, float] = {}  # what branching proved, by bound

    def within(self, bound: float, time_limit: float) -> Within:
        """The cheapest choice that holds at most `bound` bytes at every position, or the best found in `time_limit`
        CPU-seconds. Raises InfeasibleError, with the least peak that was found, if there is none."""
        deadline = time.process_time() + time_limit
        if not self.points:
            self._ask({}, deadline)
        ceiling = _MODEST
        for _ in range(_ROUNDS):
            best, lower = self._best(bound), self._proof(bound)[1]
            if best is not None and (best.cost - lower <= _CLOSE * best.cost or time.process_time() > deadline):
                break
            if best is not None:
                ceiling = _RICH
            elif ceiling > _RICH or lower > _HOPELESS * max(point.cost for point in self.points):
                break
            prices, value = self._master(bound, ceiling)
            if best is None:
                ceiling *= _RISE
                self._ask(prices, deadline)
            elif value - lower <= _CLOSE * best.cost or not self._ask(prices, deadline):
                break
            self._merge(bound)
        best, lower = self._best(bound), self._proof(bound)[1]
        if self._pairs <= _SMALL and (best is None or best.cost - lower > TOLERANCE * abs(best.cost)):
            self._finish(bound, deadline)
        best, (prices, lower) = self._best(bound), self._proof(bound)
        if best is None:
            least = min(point.peak for point in self.points)
            raise InfeasibleError(
                f"no plan was found that holds at most {in_bytes(bound)} a device; the smallest peak found is "
                f"{in_bytes(least)}"
            )
        lower = max(lower, self.finished.get(bound, -math.inf))
        return Within(best.choice, best.cost, min(lower, best.cost), best.held, prices)

    def _best(self, bound: float) -> _Point | None:
        return min((p for p in self.points if p.peak <= bound), key=lambda p: p.cost, default=None)

    def _proof(self, bound: float) -> tuple[dict[int, float], float]:
        """The prices that prove most for a bound, and what."""
        proofs = ((prices, least - bound * math.fsum(prices.values())) for prices, least in self.proofs)
        return max(proofs, key=lambda proof: proof[1])

    def _ask(self, prices: dict[int, float], deadline: float) -> bool:
        """Solve at these prices; whether a choice was found that was not known."""
        priced = self.holdings.priced(self.problem, prices) if prices else self.problem
        left = max(deadline - time.process_time(), 1.0)
        found: Solution = solve(priced, time_limit=left, certify=False)
        self.proofs.append((prices, found.lower_bound))
        if any(point.choice == found.choice for point in self.points):
            return False
        self.points.append(self._point(found.choice))
        return True

    def _point(self, choice: list[int]) -> _Point:
        return _Point(choice, evaluate(self.problem, choice), self.holdings.timeline(choice))

    def _master(self, bound: float, ceiling: float) -> tuple[dict[int, float], float]:
        """The prices, up to a ceiling, at which all that is known of the dual is greatest, and its value there."""
        from scipy.optimize import linprog  # takes a second to import, and few compilations have a budget

        places = sorted({int(point.held.argmax()) for point in self.points})
        # maximise z subject to z <= cost_k + sum_t p_t (held_kt - bound); prices in units of cost per bound
        unit = max(abs(self.points[0].cost), 1e-12)
        over = np.array([[point.held[t] / bound - 1.0 for t in places] for point in self.points])
        rows = np.hstack([np.ones((len(over), 1)), -over])
        costs = np.array([point.cost for point in self.points]) / unit
        found = linprog(
            [-1.0, *[0.0] * len(places)], A_ub=rows, b_ub=costs, bounds=[(None, None), *[(0.0, ceiling)] * len(places)]
        )
        prices = {t: float(p) * unit / bound for t, p in zip(places, found.x[1:], strict=True) if p > 0.0}
        return prices, float(found.x[0]) * unit

    @cached_property
    def _pairs(self) -> int:
        return sum(table.size for table in self.problem.edges.values())

    def _finish(self, bound: float, deadline: float) -> None:
        """Where the network is small: close what prices leave open by branching, with the bound at every position at
        which a choice has exceeded it."""
        from shardc.solver.milp import solve_milp  # takes a second to import, and few compilations come this far

        scale = _MILP_UNITS / max(max(abs(point.cost) for point in self.points), 1e-300)
        edges = {edge: table * scale for edge, table in self.problem.edges.items()}
        for one, other in self.holdings.pairs() - edges.keys():
            edges[one, other] = np.zeros((len(self.problem.unary[one]), len(self.problem.unary[other])))
        unary = [cost * scale for cost in self.problem.unary]
        while True:
            places = sorted({int(point.held.argmax()) for point in self.points})
            limits = [self._limit(place, bound) for place in places]
            outcome = solve_milp(unary, edges, max(deadline - time.process_time(), 0.1), limits)
            self.finished[bound] = max(outcome.lower / scale, self.finished.get(bound, -math.inf))
            if outcome.choice is None:
                return
            point = self._point(outcome.choice)
            self.points.append(point)
            if not outcome.finished or point.peak <= bound * (1.0 + TOLERANCE) or int(point.held.argmax()) in places:
                return

    def _limit(self, position: int, bound: float) -> Limit:
        from shardc.solver.milp import Limit

        held = self.holdings.at(position)
        alone = [(h.one, h.table) for h in held if h.other is None]
        return Limit(alone, [((h.one, h.other), h.table) for h in held if h.other is not None], bound)

    def _merge(self, bound: float) -> None:
        """Between the best choice and each that is cheaper but too large: take what fits of the latter."""
        for point in sorted(self.points, key=lambda one: one.peak):
            best = self._best(bound)
            if best is not None and point.peak > bound and point.cost < best.cost:
                merged = self._merged(best, point, bound)
                if merged.cost < best.cost:
                    self.points.append(merged)

    def _merged(self, small: _Point, fast: _Point, bound: float) -> _Point:
        choice, held = [*small.choice], small.held.copy()
        ways: list[tuple[float, Array, list[int]]] = []
        for part in self._parts(small.choice, fast.choice):
            other = [*small.choice]
            for v in part:
                other[v] = fast.choice[v]
            gain = self._cost_around(part, other) - self._cost_around(part, small.choice)
            change = self.holdings.around(part, other) - self.holdings.around(part, small.choice)
            if gain < 0.0:
                ways.append((gain / max(float(change.max()), 1.0), change, part))
        for _, change, part in sorted(ways, key=lambda way: way[0]):
            if float((held + change).max()) <= bound:
                held += change
                for v in part:
                    choice[v] = fast.choice[v]
        return self._point(choice)

    def _parts(self, one: Sequence[int], other: Sequence[int]) -> list[list[int]]:
        """The variables in which two choices differ, in parts that share no table."""
        left = {v for v, (x, y) in enumerate(zip(one, other, strict=True)) if x != y}
        found: list[list[int]] = []
        while left:
            stack, part = [left.pop()], list[int]()
            while stack:
                v = stack.pop()
                part.append(v)
                near = self._neighbours[v] & left
                left -= near
                stack += near
            found.append(sorted(part))
        return sorted(found)

    @cached_property
    def _neighbours(self) -> list[set[int]]:
        around: list[set[int]] = [set() for _ in self.problem.unary]
        for u, v in [*self.problem.edges, *self.holdings.pairs()]:
            around[u].add(v)
            around[v].add(u)
        return around

    def _cost_around(self, part: Sequence[int], choice: Sequence[int]) -> float:
        """What a part and its tables cost."""
        terms = [float(self.problem.unary[v][choice[v]]) for v in part]
        edges = {(min(u, v), max(u, v)) for u in part for v in self._neighbours[u]}
        tables = ((u, v, self.problem.edges.get((u, v))) for u, v in edges)
        return math.fsum([*terms, *(float(t[choice[u], choice[v]]) for u, v, t in tables if t is not None)])
