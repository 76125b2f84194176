"""Minimise a cost network, and prove it.

0. Many equal layers are folded to a few (`fold.py`), and the search is over those, by way of a proof (`prove.py`). The
   choice is unfolded, and proved for the whole network by way of a ring of layers (`ring.py`); if that succeeds, that
   is all.
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

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from shardc.solver import tuning
from shardc.solver.bounds.bound import Bound
from shardc.solver.bounds.distinct import Tables
from shardc.solver.exact.active import Active
from shardc.solver.exact.eliminate import eliminate, find_order
from shardc.solver.exact.forest import descend
from shardc.solver.exact.presolve import ReducedNetwork
from shardc.solver.exact.search import Search
from shardc.solver.layers.fold import Fold, fold
from shardc.solver.layers.ring import Prove, around
from shardc.solver.memory_terms import Prices
from shardc.solver.problem import TOLERANCE, Problem, evaluate, magnitude
from shardc.solver.proof.certificate import Certificate, check, left
from shardc.solver.proof.prove import Known, Proof, clipped, prove
from shardc.solver.proof.remainder import Remainder


@dataclass(frozen=True)
class Trail:
    """How a network folds, if many layers repeat, and what was found and proved for its template."""

    fold: Fold | None
    choice: list[int] = field(default_factory=list[int])
    certificate: Certificate = field(default_factory=lambda: Certificate({}))
    lower: float = -math.inf
    tables: Tables = field(default_factory=Tables)

    @staticmethod
    def of(problem: Problem, kept: int = 1) -> Trail:
        """The fold to so many layers on either side."""
        folded = fold(problem, kept)
        worth = folded is not None and tuning.FOLD_FACTOR * len(folded.template.unary) <= len(problem.unary)
        return Trail(folded if worth else None)

    def at(self, choice: Sequence[int]) -> Trail:
        """The trail from a choice for the whole network."""
        return replace(self, choice=list(choice) if self.fold is None else [choice[v] for v in self.fold.kept])

    def over(self, problem: Problem) -> Trail:
        """The trail for other costs, and some of the edges."""
        self.tables.next()
        folded = self.fold.over(problem) if self.fold else None
        known = self.certificate.messages
        left = {edge: known[edge] for edge in known if folded is None or edge in folded.template.edges}
        return replace(self, fold=folded, certificate=replace(self.certificate, messages=left))


@dataclass(frozen=True)
class Solution:
    """A choice per variable. `lower_bound` is proved by the search; `check` tells what the certificate proves alone.
    Under a bound on memory it is for the costs with these prices (`budget.py`), and `check_within` tells."""

    choice: list[int]
    cost: float
    lower_bound: float
    exact: bool
    certificate: Certificate
    trail: Trail | None = None
    prices: Prices | None = None

    @property
    def gap(self) -> float:
        return self.cost - self.lower_bound


def solve(
    problem: Problem, *, time_limit: float | None = None, certify: bool = True, enough: float = TOLERANCE,
    trail: Trail | None = None, draft: bool = False,
) -> Solution:  # fmt: skip
    """The cheapest choice, or one whose cost is proved to be within `enough` times itself of that. Raises
    InfeasibleError if every choice is forbidden, TimeoutError if none was found in time.

    `certify=False` skips the sweeps over the unreduced problem; the certificate is then as good as it comes. A search
    with the `trail` of a network that differs in its costs starts from there. A `draft` goes without triplets,
    and for a network with many equal layers without a bound.
    """
    if trail is None:
        problem.check()
    goal = _Goal(math.inf if time_limit is None else time.process_time() + time_limit, certify, enough)
    trail = trail.over(problem) if trail else Trail.of(problem)
    known: Solution | None = None
    if trail.fold:
        known = _unfolded(problem, trail, trail.fold, goal, draft)
        if draft or known.gap <= enough * abs(known.cost) or len(problem.unary) > tuning.LARGE_NETWORK:
            return known
    choice, lower = _searched(problem, goal, known.choice if known else None, draft)
    if known is not None:
        choice = min(known.choice, choice, key=lambda one: evaluate(problem, one))
        lower = max(known.lower_bound, lower)
    certificate = known.certificate if known else Certificate({})
    if certify:
        certificate = prove(problem, goal.known(problem, choice), goal.deadline, known.certificate if known else None)
    return _solution(problem, choice, lower, certificate, known.trail if known else trail)


@dataclass(frozen=True)
class _Goal:
    """What is asked: by when, whether with a certificate, and to which part of the cost."""

    deadline: float
    certify: bool
    enough: float

    @property
    def rough(self) -> bool:
        """Whether a gap is allowed that is more than rounding."""
        return self.enough > TOLERANCE

    def known(self, problem: Problem, choice: list[int]) -> Known:
        cost = evaluate(problem, choice)
        return Known(cost, max(TOLERANCE * magnitude(problem, choice), self.enough * abs(cost)))

    def part(self) -> _Goal:
        """The same with a deadline that leaves time for what comes after."""
        now = time.process_time()
        return replace(self, deadline=now + tuning.STEP_TIME_SHARE * (self.deadline - now))


def _solution(
    problem: Problem, choice: list[int], lower: float, certificate: Certificate, trail: Trail | None = None
) -> Solution:
    """What is known by now; `lower` is what every choice costs at least, by the search."""
    cost, proved = evaluate(problem, choice), check(problem, certificate)
    lower = min(max(lower, proved), cost)
    exact = cost - lower <= TOLERANCE * magnitude(problem, choice)
    return Solution(choice, cost, cost if exact else lower, exact, certificate, trail)


def _searched(
    problem: Problem, goal: _Goal, known: list[int] | None = None, draft: bool = False
) -> tuple[list[int], float]:
    """The best choice found, and what every choice costs at least. The search starts from the known choice."""
    network = ReducedNetwork(problem)
    network.shrink()
    core = network.core()
    search = Search(Bound(core.unary, core.edges), goal.deadline, goal.enough, network.constant, draft)
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


def is_small(problem: Problem) -> bool:
    """Whether a sweep over all values takes less than seconds."""
    return sum(table.size for table in problem.edges.values()) <= tuning.SHORT_SWEEP_ENTRIES


def _unfolded(problem: Problem, trail: Trail, folded: Fold, goal: _Goal, draft: bool) -> Solution:
    """What was found and proved for the template, carried over; what it costs and proves here is worked out here."""
    trail = _followed(trail, folded.template, goal.part(), draft)
    choice = folded.unfolded_choice(trail.choice)
    if not math.isfinite(evaluate(problem, choice)):
        choice = _mended(problem, choice, goal)
    if draft:
        return Solution(choice, evaluate(problem, choice), -math.inf, False, Certificate({}), trail)
    solution = _solution(problem, choice, -math.inf, _carried_over(problem, trail, folded, goal, choice), trail)
    closes = goal.certify or is_small(problem)
    if solution.exact or solution.gap <= goal.enough * abs(solution.cost) or not closes:
        return solution
    return _closed(problem, solution, goal)


def _carried_over(problem: Problem, trail: Trail, folded: Fold, goal: _Goal, choice: list[int]) -> Certificate:
    """A certificate for the whole network."""
    aim = goal.known(problem, choice).tolerance

    def proof(part: float, sweeps: int | None, afresh: bool = False) -> Prove:
        def proved(network: Problem, chosen: Sequence[int], start: Certificate) -> Certificate:
            known, begin = Known(evaluate(network, chosen), part * aim), None if afresh else start
            return prove(network, known, goal.part().deadline, begin, sweeps, goal.rough, trail.tables)

        return proved

    # what the template's messages leave open, sweeps from there seldom close
    ring = proof(tuning.RING_COPIES / folded.count, tuning.PROOF_SWEEPS, afresh=not goal.rough)
    ends = proof(tuning.ENDS_TOLERANCE_SHARE, tuning.PROOF_SWEEPS if goal.rough else None)
    found = around(problem, folded, trail.choice, trail.certificate, ring, ends)
    return found or folded.unfolded_certificate(trail.certificate)


def _closed(problem: Problem, known: Solution, goal: _Goal) -> Solution:
    """The solution without the gap that is left where the first and last layers are at odds with the middle. That is
    small: few of the values could be in a better choice, and most often elimination searches them all at once. Where
    they are too many, one sweep over all layers comes first."""
    if time.process_time() > goal.deadline:
        return known
    finished = _finished(problem, known)
    if finished is not None:
        return finished
    bound = clipped(problem, known.cost).starting(known.certificate)
    certificate = Proof(problem, bound, goal.known(problem, known.choice), goal.deadline).certificate()
    swept = _solution(problem, known.choice, -math.inf, certificate, known.trail)
    if swept.lower_bound > known.lower_bound:
        finished = _finished(problem, swept)
        if finished is not None:
            return finished
    if len(problem.unary) <= tuning.LARGE_NETWORK:
        goal = goal.part()
    search = Search(bound, goal.deadline, goal.enough)
    search.start(known.choice)
    choice = search.close()
    if goal.certify:
        certificate = prove(problem, goal.known(problem, choice), goal.deadline, certificate)
    return _solution(problem, choice, search.lower, certificate, known.trail)


def _finished(problem: Problem, known: Solution) -> Solution | None:
    """The solution with the best choice among the values that its certificate leaves open; None where they are many."""
    keep = left(problem, known.certificate, known.cost)
    for mask, value in zip(keep, known.choice, strict=True):
        mask[value] = True
    order = find_order([int(np.count_nonzero(mask)) for mask in keep], list(problem.edges))
    if not order.narrow:
        return None
    active = Active(keep)
    small = active.problem(problem)
    choice = active.outside(eliminate(small.unary, small.edges, order)[1])
    cost, remainder = evaluate(problem, choice), Remainder(known.cost, tuple(order.variables))
    certificate = replace(known.certificate, remainder=remainder)
    return replace(known, choice=choice, cost=cost, lower_bound=cost, exact=True, certificate=certificate)


def _mended(problem: Problem, choice: list[int], goal: _Goal) -> list[int]:
    """A choice that is allowed, near one that is not."""
    terms = [float(cost[choice[v]]) for v, cost in enumerate(problem.unary)]
    terms += [float(table[choice[u], choice[v]]) for (u, v), table in problem.edges.items()]
    found = descend(clipped(problem, 2.0 * math.fsum(filter(math.isfinite, terms))), choice)
    return found if math.isfinite(evaluate(problem, found)) else _searched(problem, goal)[0]


def _followed(trail: Trail, template: Problem, goal: _Goal, draft: bool) -> Trail:
    """The trail with what is found and proved for its template. A draft sweeps over all values a few times only, and
    finds its choice among those that matter by then."""
    proof = _begun(template, goal, trail)
    if not draft or proof is None or proof.choice is None:
        proof = _proved(template, goal, proof)
        return replace(trail, choice=proof.chosen, certificate=proof.certificate(), lower=proof.lower)
    proof.sweep(tuning.DRAFT_SWEEPS if trail.certificate.messages else 2 * tuning.DRAFT_SWEEPS, searching=False)
    certificate, active = proof.certificate(), Active.of(proof.reduced_costs(), proof.choice)
    small = active.problem(template)
    start = Trail(None, active.inside(proof.choice), active.messages(certificate, small.edges))  # triplets stay behind
    sketch = _begun(small, goal, start)
    if sketch is not None:
        sketch.sweep()  # a choice is wanted: triplets would prove more, and seldom find a better one
    if sketch is None or sketch.choice is None:
        sketch = _proved(small, goal, sketch)
    return replace(trail, choice=active.outside(sketch.chosen), certificate=certificate, lower=proof.lower)


def _begun(problem: Problem, goal: _Goal, start: Trail) -> Proof | None:
    """A proof from where the trail begins; None where nothing is known and tables forbid something."""
    if start.choice and math.isfinite(evaluate(problem, start.choice)):
        cost = evaluate(problem, start.choice)
        bound = clipped(problem, cost, goal.rough, start.tables).starting(start.certificate)
        proof = Proof(problem, bound, None, goal.deadline, goal.enough)
        proof.take(start.choice)
        return proof
    if all(np.isfinite(table).all() for table in [*problem.unary, *problem.edges.values()]):
        bound = clipped(problem, math.inf, goal.rough, start.tables)
        return Proof(problem, bound, None, goal.deadline, goal.enough)
    return None


def _proved(problem: Problem, goal: _Goal, proof: Proof | None) -> Proof:
    """A proof with the best choice found. Most often it comes upon that by itself. A rough one sweeps only: triplets
    take as long again, and seldom prove more than the prices that it is for are off."""
    closed = proof is not None and (proof.sweep() if goal.rough else proof.run())
    if proof and (closed or goal.rough) and proof.choice is not None:
        return proof
    choice, _ = _searched(problem, goal, proof.choice if proof else None)
    known = goal.known(problem, choice)
    proof = proof or Proof(problem, clipped(problem, known.cost), None, goal.deadline)
    if known.cost < proof.cost:
        proof.know(choice, known)
    proof.run()
    return proof
