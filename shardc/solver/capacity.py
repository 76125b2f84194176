"""The cheapest choice whose load stays within a capacity at every position.

1. Draft: solve the Lagrangian roughly at one vector of multipliers after the other (`cutting_planes.py`), and recombine
   the choices found (`recombine.py`), until the best of them meets what the dual seems to prove.
2. Prove: solve once more in full at the multipliers that seem best. If they are new, draft on from there. Where that
   proves less than the cheapest choice of all costs, prove it without multipliers.
3. Close: branch over a small network (`exact/milp.py`), polish the best choice of another.

The dual leaves a gap that no multipliers close: the capacity may lie between two choices of the same Lagrangian cost.
The answer states that gap.

    ten variables, each cost 2 and load 0, or cost 1 and load 1; capacity 3
    at multiplier 1 both values cost 2, so the dual proves 20 - 3 = 17; merging finds a choice that costs 17
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from shardc.errors import InfeasibleError
from shardc.solver import tuning
from shardc.solver.cutting_planes import CuttingPlanes, DualPoint
from shardc.solver.loads import Loads, Relaxation
from shardc.solver.pareto import Point, Points
from shardc.solver.problem import TOLERANCE, Problem, magnitude
from shardc.solver.proof.certificate import Certificate
from shardc.solver.recombine import Recombination
from shardc.solver.solve import Solution, WarmStart, is_small, solve

if TYPE_CHECKING:
    from shardc.solver.exact.milp import LinearLimit


class OverCapacityError(InfeasibleError):
    """No choice within `capacity` was found; `smallest` is the smallest peak load that was."""

    def __init__(self, capacity: float, smallest: float) -> None:
        super().__init__(f"no choice was found within a capacity of {capacity:g}; the smallest peak is {smallest:g}")
        self.capacity, self.smallest = capacity, smallest


class Frontier:
    """The trade of cost against peak load, as far as it was looked at: what one capacity taught serves the next."""

    def __init__(self, problem: Problem, loads: Loads) -> None:
        self.problem, self.loads = problem, loads
        self.warm_start = WarmStart.of(loads.linked(problem), tuning.FOLD_KEPT)
        self.points = Points(problem, loads)
        self.dual = CuttingPlanes(self.points)
        self.branched: dict[float, float] = {}  # what branching proved, by capacity
        self.free = -math.inf  # what the cheapest choice without any capacity costs, about
        self._recombination = Recombination(problem, loads, self.points, self.warm_start.fold)
        if self.warm_start.fold:
            self.final_gap = tuning.CAPACITY_GAP_FOLDED
            self.step_gap = tuning.STEP_GAP_SHORT if is_small(problem) else tuning.STEP_GAP_FOLDED
        else:
            self.final_gap, self.step_gap = tuning.CAPACITY_GAP, tuning.STEP_GAP

    def know(self, free: Solution, choice: list[int]) -> None:
        """Take what is known from a network that this one extends: the solution there without any capacity, and a
        choice here. No choice here may cost less than the least there."""
        draft = not math.isfinite(free.lower_bound)
        least = self.free = free.cost if draft else free.lower_bound
        self.dual.known.append(DualPoint({}, least, Certificate({}), draft))  # that certificate is of another network
        self.points.add(self.points.evaluated(choice))
        self.warm_start = self.warm_start.at(choice)

    def within(self, capacity: float, time_limit: float) -> Solution:
        """The cheapest choice within a capacity, or the best found in `time_limit` CPU-seconds.

        Raises OverCapacityError if none was found, InfeasibleError if every choice is forbidden, and TimeoutError if
        the time did not suffice for any choice."""
        deadline = time.process_time() + time_limit
        if not self.points.all:
            self._ask({}, deadline)
        self._alternate(capacity, deadline)
        if self.dual.best(capacity).bound(capacity) < self.free and not self.dual.proved({}):
            self._ask({}, deadline)  # what is proved without a capacity holds within every one
        self._merge(capacity)
        self._close(capacity, deadline)
        best = self.points.best(capacity)
        if best is None:
            raise OverCapacityError(capacity, min(point.peak for point in self.points.all))
        return self._solution(best, capacity)

    def proved_for(self, solution: Solution, capacity: float) -> Solution:
        """The same choice, with what is proved for another capacity."""
        return self._solution(self.points.evaluated(solution.choice), capacity)

    def smallest(self) -> Solution:
        """The cheapest choice with the smallest peak of those found, with what is proved for that peak."""
        point = self.points.smallest()
        return self._solution(point, point.peak)

    def _alternate(self, capacity: float, deadline: float) -> None:
        """Draft, prove, and draft on, until the drafts end at multipliers that are proved already."""
        took = 0.0
        for _ in range(tuning.PROOFS):
            if took and time.process_time() + took > deadline and self.points.best(capacity) is not None:
                break
            start = time.process_time()
            multipliers = self._drafted(capacity, start + tuning.STEP_TIME_SHARE * (deadline - start))
            start = time.process_time()
            proofs = any(point.fine for point in self.dual.known)
            if self.dual.proved(multipliers) or (proofs and start > deadline):
                break
            self._ask(multipliers, deadline)
            took = time.process_time() - start
            self.dual.known = [point for point in self.dual.known if not point.draft]

    def _drafted(self, capacity: float, deadline: float) -> Mapping[int, float]:
        """Draft at one vector of multipliers after the other, until the best choice meets what seems to be proved.
        Returns the multipliers that prove most, or will."""
        ceiling, scale = tuning.CEILING_FIRST, 1.0
        for _ in range(tuning.DRAFTS):
            best, proof = self.points.best(capacity), self.dual.best(capacity, drafts=True)
            lower = proof.bound(capacity)
            if best is not None and (best.cost - lower <= self.final_gap * best.cost or time.process_time() > deadline):
                break
            if best is None and (min(ceiling, scale) > tuning.CEILING_LAST or self._hopeless(lower, proof)):
                break
            limit = tuning.CEILING_LAST if best else min(ceiling, tuning.CEILING_LAST)
            multipliers, value = self.dual.next(capacity, limit)
            if best is None:
                ceiling *= tuning.CEILING_GROWTH
                scaled = {t: scale * multiplier for t, multiplier in multipliers.items()}
                if not self._ask(scaled, deadline, tuning.DRAFT_GAP_UNFIT):
                    scale *= tuning.CEILING_GROWTH  # the best multipliers are known, and what they choose does not fit
                continue
            trials = (multipliers,)
            if len(multipliers) > 1:
                trials = self.dual.halfway(multipliers, capacity), multipliers
            if value - lower <= self._little(best.cost, lower) or time.process_time() > deadline:
                break
            if self._folded and value - lower <= tuning.PROOF_INSTEAD * self.final_gap * best.cost:
                return trials[0]
            if not any(self._ask(trial, deadline, tuning.DRAFT_GAP) for trial in trials):
                break
            if value - lower <= tuning.MERGE_PROMISE * abs(value):
                self._merge(capacity)
        return self.dual.best(capacity, drafts=True).multipliers

    def _hopeless(self, lower: float, proof: DualPoint) -> bool:
        """Whether so much is proved that most likely nothing fits."""
        dearest = max(point.cost for point in self.points.all)
        sure = lower - tuning.DRAFT_GAP_UNFIT * abs(proof.least) * proof.draft
        return sure > tuning.HOPELESS * dearest

    def _little(self, cost: float, lower: float) -> float:
        """What better multipliers must promise: the final gap; without a fold also a part of the gap that is open."""
        part = 0.0 if self._folded else min(tuning.OPEN_SHARE * (cost - lower), tuning.OPEN_MOST * cost)
        return max(self.final_gap * cost, part)

    def _ask(self, multipliers: Mapping[int, float], deadline: float, draft_gap: float | None = None) -> bool:
        """Solve with these multipliers; whether that found a new choice. With `draft_gap`, a draft to that gap. Without
        a fold, a draft proves something too."""
        draft, relative_gap = draft_gap is not None, draft_gap or self.step_gap
        penalised = self.loads.lagrangian(self.problem, multipliers) if multipliers else self.problem
        left = max(deadline - time.process_time(), 1.0)
        solution = solve(
            penalised, time_limit=left, certify=False, relative_gap=relative_gap,
            warm_start=self.warm_start, draft=draft,
        )  # fmt: skip
        if solution.warm_start is not None:
            self.warm_start = replace(solution.warm_start, fold=self.warm_start.fold)
        unproved = draft and self._folded
        least = solution.cost if unproved else solution.lower_bound
        self.dual.known.append(DualPoint(multipliers, least, solution.certificate, unproved, fine=not draft))
        if self.points.has(solution.choice):
            return False
        self.points.add(self.points.evaluated(solution.choice))
        return True

    def _merge(self, capacity: float) -> None:
        self._recombination.merge(capacity, self.dual.best(capacity, drafts=True).multipliers)

    def _close(self, capacity: float, deadline: float) -> None:
        """Close the gap that multipliers leave, by branching or by polishing."""
        best, lower = self.points.best(capacity), self.dual.best(capacity).bound(capacity)
        gap = math.inf if best is None else (best.cost - lower) / max(abs(best.cost), 1e-300)
        narrow = gap < tuning.WIDE_GAP
        most = tuning.BRANCHED_PAIRS_CAPACITY if narrow else tuning.BRANCHED_PAIRS_WIDE_GAP
        if self._pairs <= most and gap > TOLERANCE:
            self._branch(capacity, deadline)
        if not self._folded and gap > self.final_gap:
            self._recombination.polish(capacity, self.dual.best(capacity).multipliers, deadline)

    def _branch(self, capacity: float, deadline: float) -> None:
        """Branch and bound with the capacity at every position at which a point has its peak; and again where the
        answer has it elsewhere."""
        from shardc.solver.exact.milp import solve_milp  # takes a second to import, and few problems come this far

        scale = tuning.MILP_UNITS / max(max(abs(point.cost) for point in self.points.all), 1e-300)
        edges = {edge: table * scale for edge, table in self.problem.edges.items()}
        for one, other in self.loads.pairs() - edges.keys():
            edges[one, other] = np.zeros((len(self.problem.unary[one]), len(self.problem.unary[other])))
        unary = [cost * scale for cost in self.problem.unary]
        while True:
            places = self.points.peaks()
            limits = [self._limit(place, capacity) for place in places]
            outcome = solve_milp(unary, edges, max(deadline - time.process_time(), 0.1), limits)
            self.branched[capacity] = max(outcome.lower / scale, self.branched.get(capacity, -math.inf))
            if outcome.choice is None:
                return
            point = self.points.evaluated(outcome.choice)
            self.points.add(point)
            fits = point.peak <= capacity * (1.0 + TOLERANCE)
            if not outcome.finished or fits or int(point.load.argmax()) in places:
                return

    def _limit(self, position: int, capacity: float) -> LinearLimit:
        from shardc.solver.exact.milp import LinearLimit

        loads = self.loads.at(position)
        alone = [(load.one, load.table) for load in loads if load.other is None]
        both = [((load.one, load.other), load.table) for load in loads if load.other is not None]
        return LinearLimit(alone, both, capacity)

    def _solution(self, point: Point, capacity: float) -> Solution:
        proof = self.dual.best(capacity)
        branched = max((lower for at, lower in self.branched.items() if at >= capacity), default=-math.inf)
        lower = min(max(proof.bound(capacity), branched), point.cost)
        exact = point.cost - lower <= TOLERANCE * magnitude(self.problem, point.choice)
        relaxation = Relaxation(proof.multipliers, capacity, self.loads)
        return Solution(point.choice, point.cost, lower, exact, proof.certificate, None, relaxation)

    @property
    def _folded(self) -> bool:
        return self.warm_start.fold is not None

    @cached_property
    def _pairs(self) -> int:
        return sum(table.size for table in self.problem.edges.values())
