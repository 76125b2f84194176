"""Minimise a cost network, and prove the answer.

1. *Fold.* A network that repeats a block many times (a layer) is folded to a few copies, its template
   (`layers/fold.py`). The template is solved by way of a proof (`proof/prove.py`). Choice and proof are carried over
   to the whole network, to its middle layers by way of a ring (`layers/ring.py`). If that closes the gap, that is all.
2. *Presolve.* Exact rewrites shrink the network (`exact/presolve.py`).
3. *Eliminate.* A narrow rest is closed by variable elimination (`exact/eliminate.py`).
4. *Sweep.* Otherwise message passing raises a lower bound, and decodes choices (`bounds/bound.py`). As the gap falls,
   values whose reduced cost exceeds it are deleted, until the rest is narrow or the gap is closed.
5. *Tighten.* Where the bound stalls, terms over three variables are added (`bounds/triplets.py`).
6. *Branch.* What is left goes to branch and bound by HiGHS (`exact/milp.py`), unless it is far too large: then a gap
   stays, and the solution states it.

Steps 2 to 6 are `exact/search.py`. Costs are compared to a relative accuracy of 1e-9 of the sum of magnitudes in play;
nothing depends on their unit. The result depends only on the problem: ties go to the smallest index, and no random
numbers are drawn. (Under a time limit, the machine's speed decides how far the search gets.)

    two variables, costs [0, 2] and [1, 0], table [[5, 5], [0, 0]]      ->      choice [1, 1], cost 2, lower bound 2
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from shardc.solver import tuning
from shardc.solver.bounds.bound import Bound
from shardc.solver.bounds.distinct import TableCache
from shardc.solver.exact.active import ActiveSet
from shardc.solver.exact.eliminate import eliminate, find_order
from shardc.solver.exact.forest import descend
from shardc.solver.exact.presolve import ReducedNetwork
from shardc.solver.exact.search import Search
from shardc.solver.layers.fold import Fold, fold
from shardc.solver.layers.ring import ProveFunction, ring_certificate
from shardc.solver.loads import Relaxation
from shardc.solver.problem import TOLERANCE, Problem, evaluate, magnitude
from shardc.solver.proof.certificate import Certificate, check, open_values
from shardc.solver.proof.prove import Prover, Target, clipped, prove
from shardc.solver.proof.remainder import Remainder


@dataclass(frozen=True)
class WarmStart:
    """Where a search begins: how the network folds, if it does, and what was found and proved for its template (without
    a fold, for the network itself). `tables` has the tables that were looked at for repetitions."""

    fold: Fold | None
    choice: list[int] = field(default_factory=list[int])
    certificate: Certificate = field(default_factory=lambda: Certificate({}))
    lower: float = -math.inf
    tables: TableCache = field(default_factory=TableCache)

    @staticmethod
    def of(problem: Problem, kept: int = 1) -> WarmStart:
        """Nothing is known yet but the fold, to `kept` layers on either side of its cut."""
        folded = fold(problem, kept)
        if folded is not None and kept > 1 and folded.count < tuning.FOLD_KEPT_OF:
            folded = fold(problem, 1)
        worth = folded is not None and tuning.FOLD_FACTOR * len(folded.template.unary) <= len(problem.unary)
        return WarmStart(folded if worth else None)

    def at(self, choice: Sequence[int]) -> WarmStart:
        """The same with a choice for the whole network."""
        return replace(self, choice=list(choice) if self.fold is None else [choice[v] for v in self.fold.kept])

    def over(self, problem: Problem) -> WarmStart:
        """The same for a network with other costs, and some of the edges."""
        self.tables.next()
        folded = self.fold.over(problem) if self.fold else None
        messages = self.certificate.messages
        kept = {edge: messages[edge] for edge in messages if folded is None or edge in folded.template.edges}
        return replace(self, fold=folded, certificate=replace(self.certificate, messages=kept))


@dataclass(frozen=True)
class Solution:
    """A choice per variable, its cost, and a bound that the search proved; `check` tells what the certificate proves
    alone. Within a capacity, the bound rests on the Lagrangian `relaxation`, and `check_within` tells."""

    choice: list[int]
    cost: float
    lower_bound: float
    exact: bool
    certificate: Certificate
    warm_start: WarmStart | None = None
    relaxation: Relaxation | None = None

    @property
    def gap(self) -> float:
        return self.cost - self.lower_bound


def solve(
    problem: Problem, *, time_limit: float | None = None, certify: bool = True, relative_gap: float = TOLERANCE,
    warm_start: WarmStart | None = None, draft: bool = False,
) -> Solution:  # fmt: skip
    """The cheapest choice, or one whose cost is at most `relative_gap` times itself above the least.

    `time_limit` is in CPU-seconds; when it is over, the best choice so far is returned, with its gap. `certify=False`
    saves the sweeps that only serve the certificate, which is then as good as it comes. A `warm_start` comes from the
    solution of a network that differs in its costs. A `draft` adds no triplets, and with a fold proves no bound.

    Raises ValueError for NaN and -inf, InfeasibleError if every choice is forbidden, TimeoutError if none was found in
    time.
    """
    if warm_start is None:
        problem.check()
    effort = _Effort(math.inf if time_limit is None else time.process_time() + time_limit, certify, relative_gap)
    warm_start = warm_start.over(problem) if warm_start else WarmStart.of(problem)
    if warm_start.fold is None:
        choice, lower = _searched(problem, effort, None, draft)
        certificate = Certificate({})
        if certify:
            certificate = prove(problem, effort.target(problem, choice), effort.deadline)
        return _solution(problem, choice, lower, certificate, warm_start)
    folded = _solved_folded(problem, warm_start, warm_start.fold, effort, draft)
    if draft or folded.gap <= relative_gap * abs(folded.cost) or len(problem.unary) > tuning.LARGE_NETWORK:
        return folded
    choice, lower = _searched(problem, effort, folded.choice, draft)
    choice = min(folded.choice, choice, key=lambda one: evaluate(problem, one))
    certificate = folded.certificate
    if certify:
        certificate = prove(problem, effort.target(problem, choice), effort.deadline, certificate)
    return _solution(problem, choice, max(folded.lower_bound, lower), certificate, folded.warm_start)


@dataclass(frozen=True)
class _Effort:
    """How hard to try: until when (in CPU-seconds of the process), with a certificate or without, to which gap."""

    deadline: float
    certify: bool
    relative_gap: float

    @property
    def rough(self) -> bool:
        """Whether a gap is allowed that is more than rounding."""
        return self.relative_gap > TOLERANCE

    def target(self, problem: Problem, choice: list[int]) -> Target:
        """What a proof for this choice should reach."""
        cost = evaluate(problem, choice)
        return Target(cost, max(TOLERANCE * magnitude(problem, choice), self.relative_gap * abs(cost)))

    def part(self) -> _Effort:
        """The same with an earlier deadline, which leaves time for the steps that follow."""
        now = time.process_time()
        return replace(self, deadline=now + tuning.STEP_TIME_SHARE * (self.deadline - now))


def _solution(
    problem: Problem, choice: list[int], lower: float, certificate: Certificate, warm_start: WarmStart | None = None
) -> Solution:
    """The solution with the better of two bounds: `lower`, by the search, and what the certificate proves."""
    cost, proved = evaluate(problem, choice), check(problem, certificate)
    lower = min(max(lower, proved), cost)
    exact = cost - lower <= TOLERANCE * magnitude(problem, choice)
    return Solution(choice, cost, cost if exact else lower, exact, certificate, warm_start)


def _searched(
    problem: Problem, effort: _Effort, known: list[int] | None = None, draft: bool = False
) -> tuple[list[int], float]:
    """Presolve and search: the best choice found, and a lower bound. The search starts from the known choice."""
    network = ReducedNetwork(problem)
    network.shrink()
    core = network.core()
    search = Search(Bound(core.unary, core.edges), effort.deadline, effort.relative_gap, network.constant, draft)
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
        raise AssertionError(f"the choice costs {cost!r}, the solver promised {search.upper + network.constant!r}")
    return choice, min(search.lower + network.constant, cost)


def is_small(problem: Problem) -> bool:
    """Whether a sweep over all values takes less than seconds."""
    return sum(table.size for table in problem.edges.values()) <= tuning.SHORT_SWEEP_ENTRIES


def _solved_folded(problem: Problem, warm_start: WarmStart, folded: Fold, effort: _Effort, draft: bool) -> Solution:
    """Solve the template, and carry choice and proof over. What they cost and prove for the whole is computed anew."""
    warm_start = _solved_template(warm_start, folded.template, effort.part(), draft)
    choice = folded.unfolded_choice(warm_start.choice)
    if not math.isfinite(evaluate(problem, choice)):
        choice = _repaired(problem, choice, effort)
    if draft:
        return Solution(choice, evaluate(problem, choice), -math.inf, False, Certificate({}), warm_start)
    certificate = _unfolded_certificate(problem, warm_start, folded, effort, choice)
    solution = _solution(problem, choice, -math.inf, certificate, warm_start)
    if solution.exact or solution.gap <= effort.relative_gap * abs(solution.cost):
        return solution
    if effort.rough and len(problem.unary) > tuning.LARGE_NETWORK:
        return solution
    return _closed(problem, solution, effort) if effort.certify or is_small(problem) else solution


def _unfolded_certificate(
    problem: Problem, warm_start: WarmStart, folded: Fold, effort: _Effort, choice: list[int]
) -> Certificate:
    """A certificate for the whole network. What proves the template proves most of the whole, if not all. What it lacks
    is the same in every layer: at the cut, the messages that a layer takes in are not those that it sends on. A sweep
    over all layers mends that, or a ring."""
    target = effort.target(problem, choice)
    unfolded = folded.unfolded_certificate(warm_start.certificate)
    best = unfolded, check(problem, unfolded)

    def enough() -> bool:
        return target.cost - best[1] <= target.tolerance

    def sweep() -> None:
        tables, deadline = warm_start.tables, effort.part().deadline
        certificate = prove(problem, target, deadline, unfolded, tuning.UNFOLDED_SWEEPS, effort.rough, tables)
        keep(certificate)

    def keep(certificate: Certificate | None) -> None:
        nonlocal best
        if certificate is not None:
            best = max(best, (certificate, check(problem, certificate)), key=lambda one: one[1])

    def ring() -> None:
        keep(_ring_certificate(problem, warm_start, folded, effort, target))

    if effort.rough:
        for step in (sweep, ring) if unfolded.triplets else (ring, sweep):  # a ring drops triplets, but is sooner done
            if not enough():
                step()
        return best[0]
    ring()
    if target.cost - best[1] > tuning.UNFOLDED_GAP * abs(target.cost):
        sweep()
    return best[0]


def _ring_certificate(
    problem: Problem, warm_start: WarmStart, folded: Fold, effort: _Effort, target: Target
) -> Certificate | None:
    """A certificate by way of a ring. It drops triplets."""

    def proof(part: float, sweeps: int | None, afresh: bool = False) -> ProveFunction:
        """A function that proves to a part of the tolerance."""

        def proven(network: Problem, chosen: Sequence[int], start: Certificate) -> Certificate:
            inner = Target(evaluate(network, chosen), part * target.tolerance)
            deadline = effort.part().deadline
            return prove(network, inner, deadline, None if afresh else start, sweeps, effort.rough, warm_start.tables)

        return proven

    # a gap that the template's messages leave is seldom closed by sweeping on from them
    ring = proof(tuning.RING_COPIES / folded.count, tuning.PROOF_SWEEPS, afresh=not effort.rough)
    ends = proof(tuning.ENDS_TOLERANCE_SHARE, tuning.PROOF_SWEEPS if effort.rough else None)
    return ring_certificate(problem, folded, warm_start.choice, warm_start.certificate, ring, ends)


def _closed(problem: Problem, carried: Solution, effort: _Effort) -> Solution:
    """Close the gap that is left where the first and last layers are at odds with the middle. It is small: few values
    could be in a better choice, and most often elimination searches them all at once. Where they are too many, one
    sweep over all layers comes first."""
    if time.process_time() > effort.deadline:
        return carried
    complete = _searched_whole(problem, carried)
    if complete is not None:
        return complete
    bound = clipped(problem, carried.cost).starting(carried.certificate)
    certificate = Prover(problem, bound, effort.target(problem, carried.choice), effort.deadline).certificate()
    swept = _solution(problem, carried.choice, -math.inf, certificate, carried.warm_start)
    if swept.lower_bound > carried.lower_bound:
        complete = _searched_whole(problem, swept)
        if complete is not None:
            return complete
    if len(problem.unary) <= tuning.LARGE_NETWORK:
        effort = effort.part()
    search = Search(bound, effort.deadline, effort.relative_gap)
    search.start(carried.choice)
    choice = search.close()
    if effort.certify:
        certificate = prove(problem, effort.target(problem, choice), effort.deadline, certificate)
    return _solution(problem, choice, search.lower, certificate, carried.warm_start)


def _searched_whole(problem: Problem, solution: Solution) -> Solution | None:
    """The best choice among the values that the certificate leaves open, by elimination; None where they are many."""
    keep = open_values(problem, solution.certificate, solution.cost)
    for mask, value in zip(keep, solution.choice, strict=True):
        mask[value] = True
    order = find_order([int(np.count_nonzero(mask)) for mask in keep], list(problem.edges))
    if not order.narrow:
        return None
    active = ActiveSet(keep)
    small = active.problem(problem)
    choice = active.outside(eliminate(small.unary, small.edges, order)[1])
    cost, remainder = evaluate(problem, choice), Remainder(solution.cost, tuple(order.variables))
    certificate = replace(solution.certificate, remainder=remainder)
    return replace(solution, choice=choice, cost=cost, lower_bound=cost, exact=True, certificate=certificate)


def _repaired(problem: Problem, choice: list[int], effort: _Effort) -> list[int]:
    """A choice of finite cost, near one that takes a forbidden value or pair."""
    terms = [float(cost[choice[v]]) for v, cost in enumerate(problem.unary)]
    terms += [float(table[choice[u], choice[v]]) for (u, v), table in problem.edges.items()]
    better = descend(clipped(problem, 2.0 * math.fsum(filter(math.isfinite, terms))), choice)
    return better if math.isfinite(evaluate(problem, better)) else _searched(problem, effort)[0]


def _solved_template(warm_start: WarmStart, template: Problem, effort: _Effort, draft: bool) -> WarmStart:
    """The warm start with what is found and proved for its template."""
    prover = _started(template, effort, warm_start)
    if not effort.rough or prover is None:
        prover = _proved(template, effort, prover)
    elif not _searched_roughly(prover, bool(warm_start.certificate.messages)) and not draft:
        prover.run()
    return replace(warm_start, choice=prover.best_choice, certificate=prover.certificate(), lower=prover.lower)


def _searched_roughly(prover: Prover, warm: bool) -> bool:
    """A few sweeps and a search among the values of small reduced cost, in turns, until the gap closes (True), or a
    turn does not help. Messages converge in few sweeps, long before a choice can be decoded from them."""
    sweeps = tuning.TURN_SWEEPS if warm else 2 * tuning.TURN_SWEEPS
    while True:
        before = prover.cost - prover.lower
        prover.sweep(sweeps, searching=False)
        if prover.choice is None:
            prover.offer()
        prover.search(roughly=True)
        gap = prover.cost - prover.lower
        if gap <= prover.tolerance:
            return True
        if gap > tuning.TURN_HELPS * before:
            return False


def _started(problem: Problem, effort: _Effort, start: WarmStart) -> Prover | None:
    """A prover that begins at a warm start; None where no choice is known and tables forbid something."""
    if start.choice and math.isfinite(evaluate(problem, start.choice)):
        cost = evaluate(problem, start.choice)
        bound = clipped(problem, cost, effort.rough, start.tables).starting(start.certificate)
        prover = Prover(problem, bound, None, effort.deadline, effort.relative_gap)
        prover.take(start.choice)
        return prover
    if all(np.isfinite(table).all() for table in [*problem.unary, *problem.edges.values()]):
        bound = clipped(problem, math.inf, effort.rough, start.tables)
        return Prover(problem, bound, None, effort.deadline, effort.relative_gap)
    return None


def _proved(problem: Problem, effort: _Effort, prover: Prover | None) -> Prover:
    """Run a prover until it has a best choice; most often it comes upon that by itself. Under a rough effort it sweeps
    only: triplets take as long again, and the multipliers that it is for are seldom as exact as what they prove."""
    closed = prover is not None and (prover.sweep() if effort.rough else prover.run())
    if prover and (closed or effort.rough) and prover.choice is not None:
        return prover
    choice, _ = _searched(problem, effort, prover.choice if prover else None)
    target = effort.target(problem, choice)
    prover = prover or Prover(problem, clipped(problem, target.cost), None, effort.deadline)
    if target.cost < prover.cost:
        prover.know(choice, target)
    prover.run()
    return prover
