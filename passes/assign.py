"""Assign: choose a strategy for every operator, so that compute and conversions together take the least time.

    %h = mm(%x, %w)      f32[32, 64]       ->   f32[32@dp, 64@tp]        strategy: dp splits m, tp splits n
    %y = mm(%h, %w2)     f32[32, 16]       ->   f32[32@dp, 16] +sum@tp   strategy: dp splits m, tp splits k
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardc.cost.hardware import Hardware
from shardc.errors import InfeasibleError, ShardcError
from shardc.mesh import Mesh
from shardc.rules.factoring import Factored, Key
from shardc.solver.network import Accepts, Assignment, Network
from shardc.solver.problem import Problem
from shardc.solver.solve import Solution, solve

TIME_LIMIT = 20.0
"""CPU-seconds after which the best plan so far is taken; the plan then tells its proven gap."""


def assign(
    factored: Factored, mesh: Mesh, device: Hardware, accepts: Mapping[Key, Accepts], whole_outputs: bool,
    wishes: Mapping[Key, Sequence[Accepts]],
) -> tuple[Network, Assignment, Solution]:
    """Build the cost network, solve it, read the choice back. Raises InfeasibleError when nothing is legal."""
    network = network_of(factored, mesh, device, accepts, whole_outputs, wishes)
    solution = solved(network.problem(), TIME_LIMIT)
    return network, network.assignment(solution.choice), solution


def network_of(
    factored: Factored, mesh: Mesh, device: Hardware, accepts: Mapping[Key, Accepts], whole_outputs: bool,
    wishes: Mapping[Key, Sequence[Accepts]],
) -> Network:
    """The cost network. Raises InfeasibleError where a variable has no value left."""
    network = Network(factored, mesh, device, accepts, whole_outputs, wishes)
    network.build()
    for variable in network.variables:
        if not variable.domain:
            raise InfeasibleError(
                f"no strategy of {variable.name} makes the layout that the constraints demand of it; "
                f"leave one of its dims open"
            )
    return network


def solved(problem: Problem, time_limit: float) -> Solution:
    """The cheapest choice, or the best that was found within `time_limit` CPU-seconds."""
    try:
        return solve(problem, time_limit=time_limit, certify=False)
    except TimeoutError as error:
        raise ShardcError(
            f"no plan was found within {time_limit:.0f} CPU-seconds; constrain more, or use fewer axes"
        ) from error
