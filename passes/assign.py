"""Assign: choose a strategy for every operator, so that compute and conversions together take the least time.

%h = mm(%x, %w)      f32[32, 64]       ->   f32[32@dp, 64@tp]        strategy: dp splits m, tp splits n
%y = mm(%h, %w2)     f32[32, 16]       ->   f32[32@dp, 16] +sum@tp   strategy: dp splits m, tp splits k
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

from shardc.analysis.memory import Memory, memory_in_order
from shardc.analysis.reductions import deferral_of, every_backward
from shardc.errors import InfeasibleError, ShardcError
from shardc.ir.printing import in_seconds
from shardc.planning.compilation import Compilation, Draft, compiler_pass
from shardc.planning.cost_network import CostNetwork, LayoutDemands
from shardc.planning.folding import along_sequences, carried, folding, may_gain, offered
from shardc.planning.given.given import GivenPlan
from shardc.planning.given.posing import network_of
from shardc.planning.given.proof import Proof
from shardc.planning.gradient_sums import complete
from shardc.planning.offers.listed import layouts_of
from shardc.planning.offers.near import Offers, too_many
from shardc.planning.out_of_memory import out_of_memory
from shardc.planning.recompute_network import RecomputeNetwork
from shardc.planning.reuse_strategies import reuse_strategies
from shardc.solver import tuning
from shardc.solver.capacity import Frontier
from shardc.solver.loads import Relaxation
from shardc.solver.problem import TOLERANCE, Problem
from shardc.solver.solve import Solution, solve

AnyNetwork = TypeVar("AnyNetwork", bound=CostNetwork)


class TooSlowError(InfeasibleError):
    """No plan takes less than `bound` seconds a step, and that is more than is wanted."""

    def __init__(self, bound: float) -> None:
        super().__init__(f"no plan takes less than {in_seconds(bound)}")
        self.bound = bound


@compiler_pass
def assign(c: Compilation) -> Compilation:
    """Build the cost network, solve it, read the choice back. Raises InfeasibleError when nothing is legal, or nothing
    fits into memory."""
    given = c.given
    if given is not None:
        c = replace(c, factored=offered(c.factored, c.mesh, given.folds))
        if given.proof is not None:
            return _as_given(c, given, given.proof)
        try:
            return _solved_anew(c)
        except InfeasibleError as error:
            raise InfeasibleError(f"with what {given.source} says held fixed: {error}") from error
    if c.reuse is not None:
        reused = _reused(c, c.reuse)
        if reused is not None:
            return reused
    return _solved_anew(c)


def _solved_anew(c: Compilation) -> Compilation:
    budget = c.options.budget
    bounded = budget is not None and not c.options.hardware_bounds
    bounded = bounded or (budget is not None and c.given is not None and c.given.recomputes)
    network, solution = c.network if c.has("network") else None, None
    if network is None and (_may_fold(c) or not bounded or too_many(c.factored, c.mesh)):
        network = first_network(c)
    if network is not None and network.balanced:
        c, network, solution = _with_orders(c, network, draft=bounded)
    if budget is not None and bounded:
        return assign_within(c, budget, network)
    assert network is not None
    free = _candidate(c, network, solution or solved(network.problem(), c.time_limit))
    if budget is None:
        return free
    fits = _if_it_fits(free, budget)
    if fits is None and free.solution is not None and free.solution.lower_bound >= c.too_slow:
        raise TooSlowError(free.solution.lower_bound)
    return fits or assign_within(c, budget, network)


def first_network(c: Compilation) -> CostNetwork:
    """The network that `assign` solves first: no plan costs less than the cheapest choice of it. Raises InfeasibleError
    where a variable has no value left. Of operators with too many strategies it has those near a plan."""
    if c.options.mode == "propagate" or not too_many(c.factored, c.mesh):
        return _built(c, CostNetwork(c.factored, c.mesh, c.options.device, _demands(c), balanced=_may_fold(c)))
    offers, cheapest = Offers(c.mesh, c.options.device), math.inf
    while True:
        made = CostNetwork(c.factored, c.mesh, c.options.device, _demands(c), balanced=_may_fold(c), offers=offers)
        found = solved(_built(c, made).problem(), c.time_limit, tuning.NEARER_GAP, draft=True)
        if found.cost > (1.0 - tuning.NEARER_GAP) * cheapest:
            return made
        plan, cheapest = made.assignment(found.choice), found.cost
        offers = offers.around(plan.strategies, layouts_of(made, plan))


def _may_fold(c: Compilation) -> bool:
    return c.options.mode != "propagate" and c.given is None and may_gain(c.factored, c.mesh)


def _with_orders(
    c: Compilation, balanced: CostNetwork, *, draft: bool
) -> tuple[Compilation, CostNetwork, Solution | None]:
    """The same, with the layouts offered that fold a sequence, where they may make a plan cheaper; the network with
    them; and its solution, if that of the balanced one is. Of a `draft`, the network is for sharing alone."""
    gap = tuning.FREE_DRAFT_GAP if draft else TOLERANCE
    found = solved(balanced.problem(), c.time_limit, gap, draft=draft)
    axes = along_sequences(c.factored, c.mesh, balanced.assignment(found.choice))
    c = replace(c, factored=offered(c.factored, c.mesh, axes))
    if draft:
        return c, balanced, None
    network = CostNetwork(c.factored, c.mesh, c.options.device, _demands(c), offers=balanced.offers)
    network.share(balanced)
    _built(c, network)
    return c, network, None if axes else carried(found, balanced.problem(), network.problem())


def _as_given(c: Compilation, given: GivenPlan, proof: Proof) -> Compilation:
    """The decisions of a file as they are: nothing is solved, and the problem is not even posed."""
    network = network_of(c, proof, _demands(c))
    assignment = given.assignment(network)
    if c.options.mode != "propagate" and too_many(c.factored, c.mesh):
        offers = Offers(c.mesh, c.options.device).around(assignment.strategies, layouts_of(network, assignment))
        network = network_of(c, proof, _demands(c), offers)
    return replace(c, network=network, assignment=assignment)


def _reused(c: Compilation, before: Compilation) -> Compilation | None:
    """The strategies that were chosen at other sizes, if they are legal here and hold no more than the budget."""
    c = replace(c, factored=offered(c.factored, c.mesh, folding(before.assignment)))
    network = CostNetwork(c.factored, c.mesh, c.options.device, replace(_demands(c), wishes={}))
    assignment = reuse_strategies(network, before.factored, before.assignment)
    if assignment is None:
        return None
    c = replace(c, network=network, assignment=assignment)
    return c if c.options.budget is None else _if_it_fits(c, c.options.budget)


def _if_it_fits(c: Compilation, budget: float) -> Compilation | None:
    c, memory = _lowered(c)
    return c if memory.peak <= budget else None


def _lowered(c: Compilation) -> tuple[Compilation, Memory]:
    """A candidate with the draft of its code, and what this holds at most without buckets and overlap."""
    from shardc.passes.pipeline import LOWERING, run  # the list of passes names this one

    snapshots: dict[str, Compilation] = {}
    candidate = run(LOWERING, c, snapshots)
    graph, program = candidate.lowered.read(), c.program
    if program.microbatches is not None:  # gradients are added up before they are reduced
        graph, program = every_backward(graph, program, deferral_of(graph, program))
    memory = memory_in_order(graph, program, c.mesh, c.states)
    return replace(c, draft=Draft(c.assignment, snapshots["reshard"].lowered, candidate.titles)), memory


def assign_within(
    c: Compilation, budget: float, known: CostNetwork | None = None, above: float = math.inf
) -> Compilation:
    """The same among the plans that hold at most `budget` bytes at once. Strategies are those of the network that is
    `known`, if one is. Operators that run again are offered only if something has to give. What a plan holds once it is
    lowered may not be what the network reckoned: then the bound is moved by the difference. What is proved is proved
    for the largest bound that was tried, of the memory that the network reckons. Where strategies are offered near a
    plan, and none fits, they are offered near the one that holds least, as long as that is less than `above`. Raises
    InfeasibleError if nothing fits."""

    def network(recompute: bool, like: CostNetwork | None = None) -> RecomputeNetwork:
        asked = c.factored, c.mesh, c.options.device, _demands(c)
        offers = known.offers if known is not None else None
        made = RecomputeNetwork(*asked, offers=offers, recompute=recompute, states=c.states)
        if like is not None:
            made.share(like)
        return _built(c, made)

    if c.given is not None and c.given.recomputes:
        full = network(recompute=True)
        frontier = Frontier(full.problem(), full.memory_terms())
    else:
        simple = network(recompute=False, like=known)
        problem, loads = simple.problem(), simple.memory_terms()
        free = solved(problem, tuning.TIME_LIMIT, tuning.FREE_DRAFT_GAP, draft=True)
        if loads.peak(free.choice) <= tuning.FREE_DRAFT_LOAD * budget:
            free = free if free.exact else solved(problem, tuning.TIME_LIMIT)
            solution = replace(free, relaxation=Relaxation({}, budget, loads))
            fits = _if_it_fits(_candidate(c, simple, solution), budget)
            if fits is not None:
                return fits
        full = network(recompute=True, like=simple)
        frontier = Frontier(full.problem(), full.memory_terms())
        frontier.know(free, full.widened(simple, free.choice))
    best: Compilation | None = None
    cheapest = math.inf
    low, bound, largest = 0.0, budget, budget

    def lowered(solution: Solution) -> Memory:
        """What the code of a choice holds; it is taken if that fits."""
        nonlocal best, cheapest
        candidate, memory = _lowered(_candidate(c, full, solution))
        if memory.peak <= budget and solution.cost < cheapest:
            best, cheapest = candidate, solution.cost
        return memory

    for _ in range(tuning.CAPACITY_TRIES):
        largest = max(largest, bound)
        try:
            solution = _within(frontier, bound)
        except InfeasibleError:
            if not low and bound >= budget:
                break
            low, bound = bound, 0.5 * (bound + budget)
            continue
        over = lowered(solution).peak - frontier.loads.peak(solution.choice)
        if best is not None and budget - over - bound < tuning.CAPACITY_TRIES_CLOSE * bound:
            break
        bound = max(budget - over, 0.5 * (low + bound))
    if best is None:
        smallest = frontier.smallest()
        least = lowered(smallest)  # which may fit
        if best is None and full.offers is not None and least.peak < above:
            plan = full.assignment(smallest.choice)
            offers = full.offers.around(plan.strategies, layouts_of(full, plan))
            nearer = CostNetwork(c.factored, c.mesh, c.options.device, _demands(c), offers=offers)
            return assign_within(c, budget, nearer, tuning.NEARER_MEMORY * least.peak)
        if best is None:
            raise out_of_memory(c, budget, least)
    assert best.solution is not None
    return replace(best, solution=frontier.proved_for(best.solution, largest))


def _candidate(c: Compilation, network: CostNetwork, solution: Solution) -> Compilation:
    return replace(c, network=network, assignment=network.assignment(solution.choice), solution=solution)


def _within(frontier: Frontier, bound: float) -> Solution:
    try:
        return frontier.within(bound, tuning.TIME_LIMIT)
    except TimeoutError as error:
        raise _too_late(tuning.TIME_LIMIT) from error


def _demands(c: Compilation) -> LayoutDemands:
    """What the user's constraints and types demand of layouts, and in `propagate` mode what they spread to."""
    wishes = c.spread.wishes() if c.options.mode == "propagate" else {}
    accepts = {**c.spread.accepts()}
    for key, is_complete in complete(c.factored).items():
        asked = accepts.get(key, is_complete)
        accepts[key] = lambda splits, asked=asked, is_complete=is_complete: asked(splits) and is_complete(splits)
    return LayoutDemands(accepts, c.options.whole_bytes, wishes)


def _built(c: Compilation, network: AnyNetwork) -> AnyNetwork:
    network.build()
    for variable in network.variables:
        if not variable.domain:
            raise InfeasibleError(
                f"no strategy of {variable.name} makes the layout that the constraints demand of it; "
                f"leave one of its dims open"
            )
    if c.given is not None:
        c.given.restrict(network)
    return network


def solved(problem: Problem, time_limit: float, relative_gap: float = TOLERANCE, draft: bool = False) -> Solution:
    """The cheapest choice, to a relative gap, or the best that was found within `time_limit` CPU-seconds."""
    try:
        solution = solve(problem, time_limit=time_limit, certify=False, relative_gap=relative_gap, draft=draft)
    except TimeoutError as error:
        raise _too_late(time_limit) from error
    return replace(solution, warm_start=None)  # nobody solves on from it, and it is large


def _too_late(time_limit: float) -> ShardcError:
    return ShardcError(f"no plan was found within {time_limit:.0f} CPU-seconds; constrain more, or use fewer axes")
