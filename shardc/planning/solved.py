"""The problem that was solved for a plan: to prove its bound anew, or to solve it again with some choices forbidden."""

from __future__ import annotations

import math
import time

from shardc.errors import InfeasibleError
from shardc.ir.printing import in_bytes
from shardc.planning.cost_network import CostNetwork
from shardc.planning.gc_pause import gc_paused
from shardc.solver.capacity import Frontier, OverCapacityError
from shardc.solver.problem import TOLERANCE, Problem, magnitude
from shardc.solver.proof.certificate import Certificate, check, check_within
from shardc.solver.proof.prove import Target, prove
from shardc.solver.solve import Solution, solve
from shardc.solver.tuning import TIME_LIMIT


class Solved:
    """A solution, and the problem that its network poses."""

    def __init__(self, network: CostNetwork, solution: Solution) -> None:
        self.solution, self.problem = solution, network.problem()
        self._certificate: Certificate | None = None
        self._proved = -math.inf

    def certified(self) -> tuple[Problem, Certificate]:
        """The problem, and a certificate of its solution. That of the search is used if it proves as much as the search
        did; else one is made now."""
        if self._certificate is None:
            with gc_paused():
                self._certify()
        assert self._certificate is not None
        return self.problem, self._certificate

    def _certify(self) -> None:
        target = Target(self.solution.cost, TOLERANCE * magnitude(self.problem, self.solution.choice))
        self._take(self.solution.certificate)
        if self.solution.lower_bound - self._proved > target.tolerance:
            proved, before = self._prove(target), (self._certificate, self._proved)
            self._take(proved)
            if self._proved < before[1]:
                self._certificate, self._proved = before

    def checked(self) -> float:
        """The lower bound, in seconds a step, that the certificate proves."""
        self.certified()
        return self._proved

    def _take(self, certificate: Certificate) -> None:
        relaxed = self.solution.relaxation
        self._certificate = certificate
        if relaxed is None:
            self._proved = check(self.problem, certificate)
        else:
            self._proved = check_within(
                self.problem, relaxed.loads.all, relaxed.multipliers, relaxed.capacity, certificate
            )

    def again(self, problem: Problem) -> Solution:
        """The best choice of `problem`, whose costs were changed, within the same bound on memory. Raises
        InfeasibleError if there is none, and TimeoutError if the search did not end within TIME_LIMIT CPU-seconds."""
        relaxed = self.solution.relaxation
        with gc_paused():
            if relaxed is None:
                return solve(problem, time_limit=TIME_LIMIT, certify=False)
            try:
                return Frontier(problem, relaxed.loads).within(relaxed.capacity, TIME_LIMIT)
            except OverCapacityError as error:
                raise InfeasibleError(
                    f"no plan was found that holds at most {in_bytes(error.capacity)} a device; the smallest peak "
                    f"found is {in_bytes(error.smallest)}; bound memory at more, take more devices, or an optimizer "
                    f"that holds less"
                ) from error

    def _prove(self, target: Target) -> Certificate:
        relaxed = self.solution.relaxation
        if relaxed is None:
            return prove(self.problem, target, time.process_time() + TIME_LIMIT, self.solution.certificate)
        try:
            penalised = relaxed.loads.lagrangian(self.problem, relaxed.multipliers)
            return solve(penalised, time_limit=TIME_LIMIT).certificate
        except TimeoutError:
            return self.solution.certificate
