"""Minimise a cost network, and prove it.

0. Many equal layers are folded to a few (`fold.py`), and the search is over those, by way of a proof (`prove.py`); if
   that, unfolded, proves the plan for the whole network, that is all.
1. `contract.py` shrinks the network exactly.
2. If what is left is narrow, `eliminate.py` finishes it at once.
3. Otherwise `bound.py` sweeps. Every few sweeps it yields an incumbent and a bound; as the gap falls, values whose
   reduced cost exceeds it are deleted. It ends when the bound meets the incumbent, or when the rest is narrow
   enough to eliminate.
4. If the bound stalls on a rest that is still wide, triplets are added where cycles are frustrated (`triplets.py`), and
   it sweeps on.
5. If there are none left to add, `milp.py` branches over the rest, unless that is far too large: then the gap stays.

Costs are compared to a relative accuracy of 1e-9 of the sum of magnitudes in play; nothing depends on their unit.
The result depends only on the problem: ties go to the smallest index, and no random numbers are drawn. (Under a
time limit, the machine's speed decides how far the search gets.)
"""

import math
import time
from dataclasses import dataclass

import numpy as np

from shardc.errors import InfeasibleError
from shardc.solver.bound import Bound
from shardc.solver.certificate import Certificate, check
from shardc.solver.contract import Network
from shardc.solver.dive import dive
from shardc.solver.eliminate import eliminate, find_order, surviving
from shardc.solver.fold import Fold, fold
from shardc.solver.leap import Leaps
from shardc.solver.problem import TOLERANCE, Problem, evaluate, magnitude
from shardc.solver.prove import Proof, clipped, prove
from shardc.solver.triplets import Groups, frustrated

MAX_SWEEPS = 400
_LOOK_EVERY = 2  # rounds of sweeps
_ROUGHLY, _FINELY = 2e-2, 1e-3  # gains between two looks, as parts of the gap, below which a bound has stalled
_AT_ONCE = 2.0**20  # work up to which elimination needs no bound before it
_ROUNDS = 20  # times that triplets are added
_HELPS = 0.02  # part of the gap that a round must close to be followed by another
_WORTH = 1e-4  # part of the gap that a triplet must promise to close
_KEPT, _BETWEEN = 1, 6  # layers kept on either side when a network is folded: at last, and before
_FOLDED = 2  # times that a network must shrink by folding to be worth it
_SEARCH = 0.6  # part of the time left that one step may take which others follow
_PASSED_ON = 12  # sweeps between two folds, where no certificate is asked for
_LARGE = 8000  # variables beyond which what folding leaves open stays open
_ENTRIES = 5e8  # entries of tables beyond which a sweep takes seconds
_PAIRS = 2e6  # pairs of values beyond which branching gets nowhere in minutes
_MILP_UNITS = 1e3  # the gap in the units given to HiGHS


@dataclass(frozen=True)
class Solution:
    """A choice per variable. `lower_bound` is proved by the search, `certified_bound` by the certificate alone."""

    choice: list[int]
    cost: float
    lower_bound: float
    exact: bool
    certificate: Certificate
    certified_bound: float

    @property
    def gap(self) -> float:
        return self.cost - self.lower_bound


def solve(problem: Problem, *, time_limit: float | None = None, certify: bool = True) -> Solution:
    """The cheapest choice. Raises InfeasibleError if every choice is forbidden, TimeoutError if none was found in time.

    `certify=False` skips the sweeps over the unreduced problem; the certificate is then the trivial one.
    """
    problem.check()
    deadline = math.inf if time_limit is None else time.process_time() + time_limit
    folds = _folds(problem)
    known = _unfolded(problem, folds, deadline, certify) if folds else None
    if known is not None and (known.exact or len(problem.unary) > _LARGE):
        return known
    choice, lower = _searched(problem, deadline, known.choice if known else None)
    if known is not None:
        choice = min(known.choice, choice, key=lambda one: evaluate(problem, one))
        lower = max(known.lower_bound, lower)
    certificate = known.certificate if known else Certificate({})
    if certify:
        cost, tolerance = evaluate(problem, choice), TOLERANCE * magnitude(problem, choice)
        certificate = prove(problem, cost, tolerance, deadline, known.certificate if known else None)
    return _solution(problem, choice, lower, certificate)


def _solution(problem: Problem, choice: list[int], lower: float, certificate: Certificate) -> Solution:
    """What is known by now; `lower` is what every choice costs at least, by the search."""
    cost, proved = evaluate(problem, choice), check(problem, certificate)
    lower = min(max(lower, proved), cost)
    exact = cost - lower <= TOLERANCE * magnitude(problem, choice)
    return Solution(choice, cost, cost if exact else lower, exact, certificate, proved)


def _searched(problem: Problem, deadline: float, known: list[int] | None = None) -> tuple[list[int], float]:
    """The best choice found, and what every choice costs at least. The search starts from the known choice."""
    network = Network(problem)
    network.shrink()
    core = network.core()
    search = Search(Bound(core.unary, core.edges), deadline)
    if known is not None:
        search.start(core.nearest(known))
    try:
        choice = network.expand(core, search.run())
    except TimeoutError:
        if known is None:
            raise
        return known, search.lower + network.constant
    cost = evaluate(problem, choice)
    if abs(cost - (search.upper + network.constant)) > TOLERANCE * magnitude(problem, choice):
        raise AssertionError(f"the plan costs {cost!r}, the solver promised {search.upper + network.constant!r}")
    return choice, min(search.lower + network.constant, cost)


def _folds(problem: Problem) -> list[Fold]:
    """The folds from the network to one of `_KEPT` layers on either side, the widest first; none if few layers repeat.

    In between is one that still has layers in its middle whose neighbours are as those of all others: what is tight in
    the smallest need not be where two layers of the middle meet."""
    found: list[Fold] = []
    for kept in (_BETWEEN, _KEPT):
        network = found[-1].template if found else problem
        folded = fold(network, kept)
        if folded is not None and _FOLDED * len(folded.template.unary) <= len(network.unary):
            found.append(folded)
    return found


def _unfolded(problem: Problem, folds: list[Fold], deadline: float, certify: bool) -> Solution:
    """What was found and proved for the template, carried over; what it costs and proves here is worked out here.

    Where that leaves a gap, it is small: hardly a value is left that could be in a better choice, and elimination
    closes it at once, most often. A certificate takes longer."""
    choice, certificate = _proved(folds[-1].template, _part(deadline))
    for folded, network in zip(reversed(folds), [*(f.template for f in folds[-2::-1]), problem], strict=True):
        choice, certificate = folded.unfolded_choice(choice), folded.unfolded_certificate(certificate)
        if network is not problem:
            cost, tolerance = evaluate(network, choice), TOLERANCE * magnitude(network, choice)
            sweeps = None if certify else _PASSED_ON
            certificate = prove(network, cost, tolerance, _part(deadline), certificate, sweeps)
    solution = _solution(problem, choice, -math.inf, certificate)
    if solution.exact or (sum(table.size for table in problem.edges.values()) > _ENTRIES and not certify):
        return solution
    if len(problem.unary) <= _LARGE:
        deadline = _part(deadline)
    search = Search(clipped(problem, solution.cost).starting(certificate), deadline)
    search.start(choice)
    choice = search.close()
    if certify:
        cost, tolerance = evaluate(problem, choice), TOLERANCE * magnitude(problem, choice)
        certificate = prove(problem, cost, tolerance, deadline, certificate)
    return _solution(problem, choice, search.lower, certificate)


def _part(deadline: float) -> float:
    """A deadline that leaves time for what comes after."""
    now = time.process_time()
    return now + _SEARCH * (deadline - now)


def _proved(problem: Problem, deadline: float) -> tuple[list[int], Certificate]:
    """The best choice found, and a certificate. Most often the proof comes upon the best choice by itself."""
    finite = all(np.isfinite(table).all() for table in [*problem.unary, *problem.edges.values()])
    proof = Proof(problem, Bound(problem.unary, problem.edges), None, deadline) if finite else None
    if proof and proof.run() and proof.choice is not None:
        return proof.choice, proof.certificate()
    choice, _ = _searched(problem, deadline)
    cost, tolerance = evaluate(problem, choice), TOLERANCE * magnitude(problem, choice)
    if proof is None:
        return choice, prove(problem, cost, tolerance, deadline)
    if cost < proof.cost:
        proof.know(choice, cost, tolerance)
    proof.run()
    assert proof.choice is not None
    return proof.choice, proof.certificate()


class Search:
    """Close the core: `choice` costs `upper`, and nothing costs less than `lower`."""

    def __init__(self, bound: Bound, deadline: float) -> None:
        self.deadline = deadline
        self.bound = bound
        self.values = [np.arange(len(cost)) for cost in bound.unary]  # what the bound's values are in the core
        self.choice: list[int] | None = None
        self.upper = math.inf
        self.lower = bound.lower

    def start(self, choice: list[int]) -> None:
        """Take a choice that is known, or what is near it."""
        self._offer(choice)
        self._offer(self.bound.improve(choice))

    def close(self) -> list[int]:
        """As `run`, from a choice and a bound that are close already: it goes only as far as that pays."""
        assert self.choice is not None
        self._prune()
        if not (self._eliminated(math.inf) or self._swept(_ROUGHLY)):
            self._eliminated(math.inf)
        return self.choice

    def run(self) -> list[int]:
        if not (
            self._eliminated(_AT_ONCE) or self._swept(_ROUGHLY) or self._eliminated(math.inf) or self._alternated()
        ):
            self._branch()
        if self.choice is None:
            raise TimeoutError("no feasible plan was found within the time limit")
        return self.choice

    def _late(self) -> bool:
        return time.process_time() > self.deadline

    def _swept(self, stall: float) -> bool:
        """Sweep and prune until closed (True) or stalled: gaining less than `stall` of the gap between two looks."""
        before, tried, leaps = -math.inf, math.inf, Leaps()
        for turn in range(1, MAX_SWEEPS // Leaps.SWEEPS + 1):
            leaps.round(self.bound)
            if turn % _LOOK_EVERY:
                continue
            self._offer(self.bound.improve(self.bound.decode()))
            self.lower = self.bound.lower
            gap = self.upper - self.lower
            if gap <= TOLERANCE * abs(self.upper) or (self._late() and self.choice is not None):
                return True
            if gap < 0.5 * tried:
                tried = gap
                self._prune()
                if self._eliminated(math.inf):
                    return True
            if self._late() or self.lower - before < stall * min(gap, abs(self.lower)):
                return False
            before = self.lower
        return False

    def _alternated(self) -> bool:
        """A better bound leaves less to search, a better incumbent less to bound: in turns, as long as either helps."""
        while True:
            before = self.upper
            if self._tightened() or self._dived():
                return True
            if self.choice is None or not self.upper < before:
                return self._late() and self.choice is not None

    def _tightened(self) -> bool:
        """Add triplets and sweep on, until closed (True) or that does not help any more."""
        for _ in range(_ROUNDS):
            if self.choice is None or self._late():
                return False
            self._prune()
            before, gap = self.lower, self.upper - self.lower
            groups = [Groups.by(cost) for cost in self.bound.reduced_costs()]
            unary, spare = self.bound.spare()
            known = {triplet.variables for triplet in self.bound.triplets}
            more = [t for t in frustrated(unary, spare, groups, _WORTH * gap, self._late) if t not in known]
            if not (more or known):
                return False
            self.bound = self.bound.with_triplets(more, groups, self.upper)
            if self._swept(_FINELY) or self._eliminated(math.inf):
                return True
            if self.lower - before < _HELPS * gap:
                return False
        return False

    def _dived(self) -> bool:
        """Where ties keep the sweeps from a good incumbent: find it exactly among the values of small reduced cost.

        Each better incumbent prunes, so that more fits the next dive; True when the rest could be eliminated whole.
        """
        while self.choice is not None and not self._late():
            before = self.upper
            self._dive()
            if not self.upper < before:
                return False
            self._prune()
            if self.upper - self.lower <= TOLERANCE * abs(self.upper) or self._eliminated(math.inf):
                return True
            for _ in range(_LOOK_EVERY * Leaps.SWEEPS):
                self.bound.sweep()
            self.lower = max(self.lower, self.bound.lower)
        return False

    def _dive(self) -> None:
        """Solve over the values whose reduced cost lies below the largest threshold that elimination can take."""
        assert self.choice is not None
        choice = dive(self.bound, self.upper - self.lower, self._incumbent(self.choice))
        if choice is not None:
            self._offer(choice)

    def _offer(self, choice: list[int]) -> None:
        """Take a choice of the bound's network as incumbent if it is better."""
        cost = self.bound.cost(choice)
        if cost < self.upper:
            self.upper = cost
            self.choice = [int(values[x]) for values, x in zip(self.values, choice, strict=True)]

    def _incumbent(self, choice: list[int]) -> list[int]:
        return [int(np.searchsorted(values, x)) for values, x in zip(self.values, choice, strict=True)]

    def _prune(self) -> None:
        """Delete every value whose reduced cost exceeds the gap."""
        if self.choice is None:
            return
        gap = self.upper - self.bound.current
        reduced = self.bound.reduced_costs()
        keep = surviving(reduced, self.bound.tables_by_edge(), gap, self._incumbent(self.choice))
        self.bound = self.bound.restricted(keep)
        self.values = [values[mask] for values, mask in zip(self.values, keep, strict=True)]

    def _eliminated(self, work: float) -> bool:
        """Eliminate all variables, if that takes no more than this work."""
        edges = self.bound.tables_by_edge()
        order = find_order([len(cost) for cost in self.bound.unary], list(edges))
        if not order.narrow or order.total > work:
            return False
        optimum, choice = eliminate(self.bound.unary, edges, order)
        if math.isinf(optimum):
            raise InfeasibleError("the constraints leave no feasible plan")
        self._offer(choice)
        self.lower = self.upper
        return True

    def _branch(self) -> None:
        """Branch over the rest, in rewritten costs; those above the gap cannot be part of a better choice."""
        from shardc.solver.milp import solve_milp  # scipy takes a second to import, and few problems come this far

        pairs = sum(t.size for t in self.bound.tables_by_edge().values())
        if self.choice is not None and (self._late() or pairs > _PAIRS):
            return
        constant, unary, edges = self.bound.rewritten_network()
        room = self.upper - constant
        top = max((float(t[np.isfinite(t)].max()) for t in [*unary, *edges.values()]), default=0.0)
        scale = _MILP_UNITS / max(min(room, top), 1e-300)
        scaled = {e: np.where(t <= room * (1.0 + TOLERANCE), t * scale, np.inf) for e, t in edges.items()}
        limit = None if math.isinf(self.deadline) else self.deadline - time.process_time()
        outcome = solve_milp([cost * scale for cost in unary], scaled, limit)
        if outcome.choice is not None:
            self._offer(outcome.choice)
        elif outcome.finished and self.choice is None:
            raise InfeasibleError("the constraints leave no feasible plan")
        proved = min(self.upper, constant + outcome.lower / scale)
        self.lower = self.upper if outcome.finished else max(self.lower, proved)
