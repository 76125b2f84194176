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
from shardc.solver.contract import Core, Network
from shardc.solver.eliminate import eliminate, find_order, surviving
from shardc.solver.fold import Fold, fold
from shardc.solver.problem import TOLERANCE, Problem, evaluate, magnitude
from shardc.solver.prove import Proof, prove
from shardc.solver.triplets import Groups, frustrated

MAX_SWEEPS = 400
_LOOK_EVERY = 5
_ROUGHLY, _FINELY = 2e-2, 1e-3  # gains between two looks, as parts of the gap, below which a bound has stalled
_AT_ONCE = 2.0**20  # work up to which elimination needs no bound before it
_ROUNDS = 20  # times that triplets are added
_HELPS = 0.02  # part of the gap that a round must close to be followed by another
_WORTH = 1e-4  # part of the gap that a triplet must promise to close
_DIVES = 40  # halvings of the gap tried in search of a part that is narrow enough
_KEPT, _BETWEEN = 1, 6  # layers kept on either side when a network is folded: at last, and before
_FOLDED = 2  # times that a network must shrink by folding to be worth it
_SEARCH = 0.6  # part of the time that the search over the template may take
_LARGE = 8000  # variables beyond which what folding leaves open stays open
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
    if folds:
        solution = _unfolded(problem, folds, deadline)
        if solution.exact or len(problem.unary) > _LARGE:
            return solution
    choice, lower = _searched(problem, deadline)
    cost, tolerance = evaluate(problem, choice), TOLERANCE * magnitude(problem, choice)
    exact = cost - lower <= tolerance
    certificate = prove(problem, cost, tolerance, deadline) if certify else Certificate({})
    proved = check(problem, certificate)
    return Solution(choice, cost, cost if exact else max(lower, proved), exact, certificate, proved)


def _searched(problem: Problem, deadline: float) -> tuple[list[int], float]:
    """The best choice found, and what every choice costs at least."""
    network = Network(problem)
    network.shrink()
    core = network.core()
    search = Search(core, deadline)
    choice = network.expand(core, search.run())
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


def _unfolded(problem: Problem, folds: list[Fold], deadline: float) -> Solution:
    """What was found and proved for the template, carried over; what it costs and proves here is worked out here."""
    template, now = folds[-1].template, time.process_time()
    choice, certificate = _proved(template, now + _SEARCH * (deadline - now))
    cost = proved = tolerance = math.nan
    for folded, network in zip(reversed(folds), [*(f.template for f in folds[-2::-1]), problem], strict=True):
        choice, certificate = folded.unfolded_choice(choice), folded.unfolded_certificate(certificate)
        cost, tolerance = evaluate(network, choice), TOLERANCE * magnitude(network, choice)
        if network is not problem:
            certificate = prove(network, cost, tolerance, deadline, certificate)
            continue
        proved = check(network, certificate)
        if cost - proved > tolerance:
            certificate = prove(network, cost, tolerance, deadline, certificate)
            proved = check(network, certificate)
    exact = cost - proved <= tolerance
    return Solution(choice, cost, cost if exact else proved, exact, certificate, proved)


def _proved(problem: Problem, deadline: float) -> tuple[list[int], Certificate]:
    """The best choice found, and a certificate. Most often the proof comes upon the best choice by itself."""
    finite = all(np.isfinite(table).all() for table in [*problem.unary, *problem.edges.values()])
    if finite:
        proof = Proof(problem, Bound(problem.unary, problem.edges), None, deadline)
        if proof.run() and proof.choice is not None:
            return proof.choice, proof.certificate()
    choice, _ = _searched(problem, deadline)
    cost = evaluate(problem, choice)
    return choice, prove(problem, cost, TOLERANCE * magnitude(problem, choice), deadline)


class Search:
    """Close the core: `choice` costs `upper`, and nothing costs less than `lower`."""

    def __init__(self, core: Core, deadline: float) -> None:
        self.deadline = deadline
        self.bound = Bound(core.unary, core.edges)
        self.values = [np.arange(len(cost)) for cost in core.unary]  # what the bound's values are in the core
        self.choice: list[int] | None = None
        self.upper = math.inf
        self.lower = -math.inf

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
        before, tried = -math.inf, math.inf
        for sweep in range(1, MAX_SWEEPS + 1):
            self.bound.sweep()
            if sweep % _LOOK_EVERY:
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
            for _ in range(_LOOK_EVERY):
                self.bound.sweep()
            self.lower = max(self.lower, self.bound.lower)
        return False

    def _dive(self) -> None:
        """Solve over the values whose reduced cost lies below the largest threshold that elimination can take."""
        assert self.choice is not None
        reduced, edges = self.bound.reduced_costs(), self.bound.tables_by_edge()
        incumbent = self._incumbent(self.choice)
        for halvings in range(1, _DIVES):
            keep = surviving(reduced, edges, (self.upper - self.lower) * 0.5**halvings, incumbent)
            part = self.bound.restricted(keep)
            order = find_order([len(cost) for cost in part.unary], list(edges))
            if order.narrow:
                _, choice = eliminate(part.unary, part.tables_by_edge(), order)
                self._offer([int(np.flatnonzero(mask)[x]) for mask, x in zip(keep, choice, strict=True)])
                return

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
