"""What was solved for a plan, to prove it anew or to solve it once more with something forbidden."""

from __future__ import annotations

import time

from shardc.solver.budget import Frontier
from shardc.solver.certificate import Certificate, check, check_within
from shardc.solver.network import Network
from shardc.solver.problem import TOLERANCE, Problem, magnitude
from shardc.solver.prove import Known, prove
from shardc.solver.solve import Solution, solve

TIME_LIMIT = 20.0
"""CPU-seconds that a certificate, or the plan of an alternative, may take."""


class Solved:
    """A solution, and the problem that its network poses."""

    def __init__(self, network: Network, solution: Solution) -> None:
        self.solution, self.problem = solution, network.problem()
        self._certificate: Certificate | None = None

    def certified(self) -> tuple[Problem, Certificate]:
        """The problem, and the certificate of its solution: that which came with it if it proves what the search did,
        else one made now."""
        if self._certificate is None:
            known = Known(self.solution.cost, TOLERANCE * magnitude(self.problem, self.solution.choice))
            self._certificate = self.solution.certificate
            if self.solution.lower_bound - self.checked() > known.tolerance:
                self._certificate = self._made(known)
        return self.problem, self._certificate

    def checked(self) -> float:
        """The lower bound that the certificate proves."""
        problem, certificate = self.certified()
        prices = self.solution.prices
        if prices is None:
            return check(problem, certificate)
        return check_within(problem, prices.holdings.all, prices.of, prices.bound, certificate)

    def again(self, problem: Problem) -> Solution:
        """The best choice at costs that were changed, within the same bound on memory. Raises InfeasibleError, and
        TimeoutError if none was found in time."""
        prices = self.solution.prices
        if prices is None:
            return solve(problem, time_limit=TIME_LIMIT, certify=False)
        return Frontier(problem, prices.holdings).within(prices.bound, TIME_LIMIT)

    def _made(self, known: Known) -> Certificate:
        prices = self.solution.prices
        if prices is None:
            return prove(self.problem, known, time.process_time() + TIME_LIMIT, self.solution.certificate)
        return solve(prices.holdings.priced(self.problem, prices.of), time_limit=TIME_LIMIT).certificate
