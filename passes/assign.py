"""Assign: choose a strategy for every operator, so that compute and conversions together take the least time.

%h = mm(%x, %w)      f32[32, 64]       ->   f32[32@dp, 64@tp]        strategy: dp splits m, tp splits n
%y = mm(%h, %w2)     f32[32, 16]       ->   f32[32@dp, 16] +sum@tp   strategy: dp splits m, tp splits k
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from shardc.cost.hardware import Hardware
from shardc.cost.memory import States
from shardc.errors import InfeasibleError, ShardcError
from shardc.ir.mesh import Mesh
from shardc.ir.printing import in_bytes
from shardc.planning.cost_network import Accepts, Assignment, CostNetwork
from shardc.planning.recompute_network import RecomputeNetwork
from shardc.rules.factors.factored import Factored, Key
from shardc.solver import tuning
from shardc.solver.capacity import Frontier
from shardc.solver.loads import Relaxation
from shardc.solver.problem import TOLERANCE, Problem
from shardc.solver.solve import Solution, solve

AnyNetwork = TypeVar("AnyNetwork", bound=CostNetwork)


@dataclass(frozen=True)
class Budget:
    """What a device may hold, in bytes, the optimizer's states among them."""

    bytes: float
    states: States


def assign(
    factored: Factored,
    mesh: Mesh,
    device: Hardware,
    accepts: Mapping[Key, Accepts],
    whole_outputs: bool,
    wishes: Mapping[Key, Sequence[Accepts]],
) -> tuple[CostNetwork, Assignment, Solution]:
    """Build the cost network, solve it, read the choice back. Raises InfeasibleError when nothing is legal."""
    network = network_of(factored, mesh, device, accepts, whole_outputs, wishes)
    solution = solved(network.problem(), tuning.TIME_LIMIT)
    return network, network.assignment(solution.choice), solution


def assign_within(
    factored: Factored, mesh: Mesh, device: Hardware, accepts: Mapping[Key, Accepts], whole_outputs: bool,
    wishes: Mapping[Key, Sequence[Accepts]], budget: Budget, peak_of: Callable[[CostNetwork, Assignment], float],
) -> tuple[CostNetwork, Assignment, Solution]:  # fmt: skip
    """As `assign`, among the plans that hold at most `budget.bytes` at once. Operators that run again are offered only
    if something has to give. `peak_of` tells what a plan holds once it is lowered; where that is not what the network
    reckoned, the bound is moved by the difference. What is proved is proved for the largest bound that was tried, of
    the memory that the network reckons. Raises InfeasibleError if nothing fits."""

    def network(recompute: bool, like: CostNetwork | None = None) -> RecomputeNetwork:
        asked = (factored, mesh, device, accepts, whole_outputs, wishes)
        made = RecomputeNetwork(*asked, recompute=recompute, states=budget.states)
        if like is not None:
            made.share(like)
        return _built(made)

    simple = network(recompute=False)
    problem, loads = simple.problem(), simple.holdings()
    free = solved(problem, tuning.TIME_LIMIT, tuning.FREE_DRAFT_GAP, draft=True)
    if loads.peak(free.choice) <= tuning.FREE_DRAFT_LOAD * budget.bytes:
        free = free if free.exact else solved(problem, tuning.TIME_LIMIT)
        assignment = simple.assignment(free.choice)
        if peak_of(simple, assignment) <= budget.bytes:
            return simple, assignment, replace(free, relaxation=Relaxation({}, budget.bytes, loads))
    full = network(recompute=True, like=simple)
    frontier = Frontier(full.problem(), full.holdings())
    frontier.know(free, full.widened(simple, free.choice))
    best: tuple[Solution, Assignment] | None = None
    low, bound, largest = 0.0, budget.bytes, budget.bytes

    def lowered(found: Solution) -> float:
        """What the code of a choice holds; it is taken if that fits."""
        nonlocal best
        assignment = full.assignment(found.choice)
        peak = peak_of(full, assignment)
        if peak <= budget.bytes and (best is None or found.cost < best[0].cost):
            best = found, assignment
        return peak

    for _ in range(tuning.CAPACITY_TRIES):
        largest = max(largest, bound)
        try:
            found = _within(frontier, bound)
        except InfeasibleError:
            if not low and bound >= budget.bytes:
                break
            low, bound = bound, 0.5 * (bound + budget.bytes)
            continue
        over = lowered(found) - frontier.loads.peak(found.choice)
        if best is not None and budget.bytes - over - bound < tuning.CAPACITY_TRIES_CLOSE * bound:
            break
        bound = max(budget.bytes - over, 0.5 * (low + bound))
    least = lowered(frontier.smallest()) if best is None else 0.0
    if best is None:
        raise InfeasibleError(
            f"no plan was found whose generated code holds at most {in_bytes(budget.bytes)} a device; the smallest "
            f"peak found is {in_bytes(least)}; bound memory at more, take more devices, or an optimizer that holds less"
        )
    found, assignment = best
    return full, assignment, frontier.proved_for(found, largest)


def _within(frontier: Frontier, bound: float) -> Solution:
    try:
        return frontier.within(bound, tuning.TIME_LIMIT)
    except TimeoutError as error:
        raise _too_late(tuning.TIME_LIMIT) from error


def network_of(
    factored: Factored,
    mesh: Mesh,
    device: Hardware,
    accepts: Mapping[Key, Accepts],
    whole_outputs: bool,
    wishes: Mapping[Key, Sequence[Accepts]],
) -> CostNetwork:
    """The cost network. Raises InfeasibleError where a variable has no value left."""
    return _built(CostNetwork(factored, mesh, device, accepts, whole_outputs, wishes))


def _built(network: AnyNetwork) -> AnyNetwork:
    network.build()
    for variable in network.variables:
        if not variable.domain:
            raise InfeasibleError(
                f"no strategy of {variable.name} makes the layout that the constraints demand of it; "
                f"leave one of its dims open"
            )
    return network


def solved(problem: Problem, time_limit: float, relative_gap: float = TOLERANCE, draft: bool = False) -> Solution:
    """The cheapest choice, to a relative gap, or the best that was found within `time_limit` CPU-seconds."""
    try:
        found = solve(problem, time_limit=time_limit, certify=False, relative_gap=relative_gap, draft=draft)
    except TimeoutError as error:
        raise _too_late(time_limit) from error
    return replace(found, warm_start=None)  # nobody solves on from it, and it is large


def _too_late(time_limit: float) -> ShardcError:
    return ShardcError(f"no plan was found within {time_limit:.0f} CPU-seconds; constrain more, or use fewer axes")
