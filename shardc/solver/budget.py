"""The cheapest choice that never holds more than a bound: prices on memory, and what they prove.

At a price of `p_t` seconds a byte held at position t, the cheapest choice of the priced network proves that every
choice within the bound costs at least

    min over x of  cost(x) + sum_t p_t * (held_t(x) - bound)

(Lagrangian relaxation; Everett 1963, "Generalized Lagrange multiplier method"). Every choice found is a line in a
linear program over the prices, whose optimum is where to ask next (Kelley 1960, "The cutting-plane method"). Only the
positions at which some choice that exceeds the bound held the most have a price.

Prices alone leave a gap: where a model has many equal layers, all of them change at the same price, though the bound
may only ask it of some. So two choices, one within the bound and one cheaper, are merged: what they differ in falls
into parts that share no table, and each part may be taken from either. Where they differ in a way that links all
layers, they are spliced: one up to some layer, the other from there on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from shardc.errors import InfeasibleError
from shardc.ir.printing import in_bytes
from shardc.solver import tuning
from shardc.solver.bounds.bound import Bound
from shardc.solver.exact.forest import step
from shardc.solver.memory_terms import MemoryTerms, Prices
from shardc.solver.problem import TOLERANCE, Array, Problem, Terms, magnitude
from shardc.solver.proof.certificate import Certificate
from shardc.solver.solve import Solution, Trail, is_small, solve

if TYPE_CHECKING:
    from shardc.solver.exact.milp import Limit


@dataclass(frozen=True)
class PriceProof:
    """Prices per position, in seconds a byte; what every choice costs at least at these prices, and the certificate of
    that as far as there is one. A draft only tells what the best choice found costs. A `fine` one proves what a
    search at these prices can; others are rough, or known from elsewhere."""

    prices: Mapping[int, float]
    least: float
    certificate: Certificate
    draft: bool = False
    fine: bool = False

    def bound(self, bound: float) -> float:
        """What every choice costs at least that holds at most `bound` bytes."""
        return self.least - bound * math.fsum(self.prices.values())


@dataclass(frozen=True)
class _Point:
    choice: list[int]
    cost: float
    held: Array
    merged: bool = False

    @property
    def peak(self) -> float:
        return float(self.held.max(initial=0.0))


class Frontier:
    """The trade of cost against memory, as far as it was looked at: what was found for one bound serves the next."""

    def __init__(self, problem: Problem, holdings: MemoryTerms) -> None:
        self.problem, self.holdings = problem, holdings
        self.points: list[_Point] = []
        self.proofs: list[PriceProof] = []
        self.finished: dict[float, float] = {}  # what branching proved, by bound
        self.trail = Trail.of(holdings.linked(problem), tuning.FOLD_KEPT)
        self.close, self.enough = (
            (tuning.CAPACITY_GAP_FOLDED, tuning.STEP_GAP_FOLDED)
            if self.trail.fold
            else (tuning.CAPACITY_GAP, tuning.STEP_GAP)
        )
        if self.trail.fold and is_small(problem):
            self.enough = tuning.STEP_GAP_SHORT

    def know(self, free: Solution, choice: list[int]) -> None:
        """What is known of the network in which nothing runs again, without prices: what was proved, if anything was,
        and a choice for it. It holds for this one too: what runs again costs no less, in any table, than what runs
        once."""
        draft = not math.isfinite(free.lower_bound)
        least = free.cost if draft else free.lower_bound
        self.proofs.append(PriceProof({}, least, Certificate({}), draft))  # theirs is of another network
        self.points.append(self._point(choice))
        self.trail = self.trail.at(choice)

    def within(self, bound: float, time_limit: float) -> Solution:
        """The cheapest choice that holds at most `bound` bytes at every position, or the best found in `time_limit`
        CPU-seconds. Raises InfeasibleError, with the least peak that was found, if there is none."""
        deadline = time.process_time() + time_limit
        if not self.points:
            self._ask({}, deadline)
        took = 0.0
        for _ in range(tuning.PROOFS):
            if took and time.process_time() + took > deadline and self._best(bound) is not None:
                break
            prices = self._drafted(bound, deadline)
            known = [proof.prices for proof in self.proofs if proof.fine]
            start = time.process_time()
            if prices in known or (known and start > deadline):
                break
            self._ask(prices, deadline)
            took = time.process_time() - start
            self.proofs = [proof for proof in self.proofs if not proof.draft]
        self._merge(bound)
        best, lower = self._best(bound), self._proof(bound).bound(bound)
        gap = math.inf if best is None else (best.cost - lower) / max(abs(best.cost), 1e-300)
        if (
            self._pairs <= (tuning.BRANCHED_PAIRS_CAPACITY if gap < tuning.WIDE_GAP else tuning.BRANCHED_PAIRS_WIDE_GAP)
            and gap > TOLERANCE
        ):
            self._finish(bound, deadline)
        if not self.trail.fold and gap > self.close:
            self._polish(bound, deadline)
        best = self._best(bound)
        if best is None:
            least = min(point.peak for point in self.points)
            raise InfeasibleError(
                f"no plan was found that holds at most {in_bytes(bound)} a device; the smallest peak found is "
                f"{in_bytes(least)}; bound memory at more, take more devices, or an optimizer that holds less"
            )
        return self._solution(best, bound)

    def _drafted(self, bound: float, deadline: float) -> Mapping[int, float]:
        """Ask at one price after the other, until what seems to be proved meets the best choice. The prices that prove
        most, or will."""
        ceiling, dearer = tuning.CEILING_FIRST, 1.0
        for _ in range(tuning.DRAFTS):
            best, proof = self._best(bound), self._proof(bound, drafts=True)
            lower = proof.bound(bound)
            if best is not None and (best.cost - lower <= self.close * best.cost or time.process_time() > deadline):
                break
            dearest = max(point.cost for point in self.points)
            sure = lower - tuning.DRAFT_GAP_UNFIT * abs(proof.least) * proof.draft
            if best is None and (min(ceiling, dearer) > tuning.CEILING_LAST or sure > tuning.HOPELESS * dearest):
                break
            prices, value = self._master(bound, tuning.CEILING_LAST if best else min(ceiling, tuning.CEILING_LAST))
            if best is None:
                ceiling *= tuning.CEILING_GROWTH
                if not self._ask({t: dearer * price for t, price in prices.items()}, deadline, tuning.DRAFT_GAP_UNFIT):
                    dearer *= tuning.CEILING_GROWTH  # the best prices are known, and what they choose does not fit
                continue
            ways = (self._between(prices, bound), prices) if len(prices) > 1 else (prices,)
            if value - lower <= self._little(best.cost, lower) or time.process_time() > deadline:
                break
            if self.trail.fold and value - lower <= tuning.PROOF_INSTEAD * self.close * best.cost:
                return ways[0]
            if not any(self._ask(way, deadline, tuning.DRAFT_GAP) for way in ways):
                break
            if value - lower <= tuning.MERGE_PROMISE * abs(value):
                self._merge(bound)
        return self._proof(bound, drafts=True).prices

    def _little(self, cost: float, lower: float) -> float:
        """What better prices must promise, where a choice costs so much and so much seems to be proved: the gap that
        ends the search, or, but for folded layers, which are yet to be mixed, a part of the gap that is open."""
        part = 0.0 if self.trail.fold else min(tuning.OPEN_SHARE * (cost - lower), tuning.OPEN_MOST * cost)
        return max(self.close * cost, part)

    def proved_for(self, found: Solution, bound: float) -> Solution:
        """The same choice with what is proved for another bound."""
        return self._solution(self._point(found.choice), bound)

    def smallest(self) -> Solution:
        """The cheapest choice that holds least of those found, with what is proved for its own peak."""
        point = min(self.points, key=lambda point: (point.peak, point.cost))
        return self._solution(point, point.peak)

    def _solution(self, point: _Point, bound: float) -> Solution:
        proof = self._proof(bound)
        branched = max((lower for at, lower in self.finished.items() if at >= bound), default=-math.inf)
        lower = min(max(proof.bound(bound), branched), point.cost)
        exact = point.cost - lower <= TOLERANCE * magnitude(self.problem, point.choice)
        prices = Prices(proof.prices, bound, self.holdings)
        return Solution(point.choice, point.cost, lower, exact, proof.certificate, None, prices)

    def _best(self, bound: float) -> _Point | None:
        return min((p for p in self.points if p.peak <= bound), key=lambda p: p.cost, default=None)

    def _proof(self, bound: float, drafts: bool = False) -> PriceProof:
        """The one that proves, or seems to prove, most for a bound."""
        return max((p for p in self.proofs if drafts or not p.draft), key=lambda proof: proof.bound(bound))

    def _ask(self, prices: Mapping[int, float], deadline: float, rough: float | None = None) -> bool:
        """Solve at these prices; whether a choice was found that was not known. What is `rough` is a draft; but for
        folded layers, that proves something too."""
        draft, folded, enough = rough is not None, self.trail.fold is not None, rough or self.enough
        priced = self.holdings.priced(self.problem, prices) if prices else self.problem
        left = max(deadline - time.process_time(), 1.0)
        found = solve(priced, time_limit=left, certify=False, enough=enough, trail=self.trail, draft=draft)
        if found.trail is not None:
            self.trail = replace(found.trail, fold=self.trail.fold)
        least = found.cost if draft and folded else found.lower_bound
        self.proofs.append(PriceProof(prices, least, found.certificate, draft and folded, fine=not draft))
        if any(point.choice == found.choice for point in self.points):
            return False
        self.points.append(self._point(found.choice))
        return True

    def _point(self, choice: list[int]) -> _Point:
        return _Point(choice, math.fsum(self._terms.at(choice).tolist()), self.holdings.timeline(choice))

    def _master(self, bound: float, ceiling: float) -> tuple[dict[int, float], float]:
        """The prices, up to a ceiling, at which all that is known of the dual is greatest, and its value there."""
        from scipy.optimize import linprog  # takes a second to import, and few compilations have a budget

        places = sorted({int(p.held.argmax()) for p in self.points if p.peak > bound})
        # maximise z subject to z <= cost_k + sum_t p_t (held_kt - bound); prices in units of cost per bound
        unit = max(abs(self.points[0].cost), 1e-12)
        over = np.array([[point.held[t] / bound - 1.0 for t in places] for point in self.points])
        rows = np.hstack([np.ones((len(over), 1)), -over])
        costs = np.array([point.cost for point in self.points]) / unit
        found = linprog(
            [-1.0, *[0.0] * len(places)], A_ub=rows, b_ub=costs, bounds=[(None, None), *[(0.0, ceiling)] * len(places)]
        )
        if found.x is None:  # HiGHS gave up: what is known best must do
            best = self._proof(bound, drafts=True)
            return dict(best.prices), best.bound(bound)
        prices = {t: float(p) * unit / bound for t, p in zip(places, found.x[1:], strict=True) if p > 0.0}
        return prices, float(found.x[0]) * unit

    def _between(self, prices: Mapping[int, float], bound: float) -> dict[int, float]:
        """Half way to the prices that seem to prove most: from there, steps do not swing from position to position
        (Ben-Ameur and Neto 2007, "Acceleration of cutting-plane and column generation algorithms")."""
        best = self._proof(bound, drafts=True).prices
        return {t: 0.5 * (prices.get(t, 0.0) + best.get(t, 0.0)) for t in sorted({*prices, *best})}

    @cached_property
    def _terms(self) -> Terms:
        return Terms.of(self.problem)

    @cached_property
    def _pairs(self) -> int:
        return sum(table.size for table in self.problem.edges.values())

    def _finish(self, bound: float, deadline: float) -> None:
        """Where the network is small: close what prices leave open by branching, with the bound at every position at
        which a choice has exceeded it."""
        from shardc.solver.exact.milp import solve_milp  # takes a second to import, and few compilations come this far

        scale = tuning.MILP_UNITS / max(max(abs(point.cost) for point in self.points), 1e-300)
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
        from shardc.solver.exact.milp import Limit

        held = self.holdings.at(position)
        alone = [(h.one, h.table) for h in held if h.other is None]
        return Limit(alone, [((h.one, h.other), h.table) for h in held if h.other is not None], bound)

    def _merge(self, bound: float) -> None:
        """Between choices within the bound and one that is cheaper but too large, all of them good at the prices that
        prove most: take what fits of the latter."""
        best, prices = self._best(bound), self._proof(bound, drafts=True).prices
        if best is None:
            return

        def priced(point: _Point) -> float:
            return point.cost + math.fsum(price * float(point.held[t]) for t, price in prices.items())

        solved = [point for point in self.points if not point.merged]
        many = 1 if self.trail.fold else tuning.MERGED_CHOICES
        large = sorted((p for p in solved if p.peak > bound), key=priced)[:many]
        small = sorted((p for p in solved if p.peak <= bound and p is not best), key=priced)[:many]
        self._take([self._merged(one, other, bound) for one in (best, *small) for other in large], bound)
        if self.trail.fold:
            self._splice(bound)

    def _take(self, found: Iterable[_Point], bound: float) -> None:
        """Note the best of choices that were made of others, if it is better than all within the bound."""
        best = self._best(bound)
        assert best is not None
        merged = min(found, key=lambda point: point.cost, default=best)
        if merged.cost < best.cost:
            self.points.append(merged)

    def _splice(self, bound: float) -> None:
        """Join the two choices on either side of the bound between layers."""
        solved = [point for point in self.points if not point.merged]
        fitting = [p for p in solved if p.peak <= bound] or [p for p in self.points if p.peak <= bound]
        small = max(fitting, key=lambda point: point.peak)
        large = min((p for p in solved if p.peak > bound), key=lambda point: point.peak, default=small)
        ways = () if large is small else (False, True)
        self._take([self._spliced(small, large, bound, first) for first in ways], bound)

    def _spliced(self, small: _Point, fast: _Point, bound: float, first: bool) -> _Point:
        """The first layers of one choice, or the last, the rest of the other: as many of the fast one as fit."""
        assert self.trail.fold is not None
        layers, last = self.trail.fold.layers, self.trail.fold.count
        fits, over = 0, last + 1
        best, held = small, [small.peak, fast.peak]
        for _ in range(tuning.SPLICES):
            part = (bound - held[0]) / max(held[1] - held[0], 1.0)
            count = min(max(fits + int(part * (over - fits)), fits + 1), over - 1)
            if not fits < count < over:
                break
            taken = (layers >= 0) & ((layers < count) if first else (layers >= last - count))
            point = self._point(np.where(taken, fast.choice, small.choice).tolist())
            if point.peak > bound:
                over, held[1] = count, point.peak
                continue
            fits, held[0] = count, point.peak
            best = min(best, point, key=lambda one: one.cost)
        return replace(best, merged=True)

    def _polish(self, bound: float, deadline: float) -> None:
        """Change one forest after the other of the best choice to what is cheapest at lower prices, as far as that
        fits."""
        prices = self._proof(bound).prices
        for part in tuning.POLISH_PARTS:
            lower = self.holdings.priced(self.problem, {t: part * price for t, price in prices.items()})
            network = Bound(lower.unary, lower.edges)
            for turn in range(tuning.POLISH_FORESTS):
                best = self._best(bound)
                if best is None or time.process_time() > deadline:
                    return
                other = self._merged(best, self._point(step(network, best.choice, turn)), bound)
                if other.cost < best.cost:
                    self.points.append(other)

    def _merged(self, small: _Point, fast: _Point, bound: float) -> _Point:
        choice, held, parts = [*small.choice], small.held.copy(), self._parts(small.choice, fast.choice)
        part = np.full(len(choice), -1)
        for number, variables in enumerate(parts):
            part[variables] = number
        owner = self._terms.parts(part)
        cheaper = (self._terms.at(fast.choice) - self._terms.at(small.choice))[owner >= 0]
        gains: list[float] = np.bincount(owner[owner >= 0], cheaper, len(parts)).tolist()
        ways = [
            (gain / max(float(change.max()), 1.0), change, variables)
            for gain, change, variables in zip(
                gains, self.holdings.changes(small.choice, fast.choice, part), parts, strict=True
            )
            if gain < 0.0
        ]
        for _, change, variables in sorted(ways, key=lambda way: way[0]):
            if float((held + change).max()) <= bound:
                held += change
                for v in variables:
                    choice[v] = fast.choice[v]
        return replace(self._point(choice), merged=True)

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
