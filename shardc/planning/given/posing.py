"""The proof of a plan as numbers, and its problem posed again by them."""

from __future__ import annotations

from dataclasses import replace

from shardc.planning.compilation import Compilation
from shardc.planning.cost_network import CostNetwork, LayoutDemands
from shardc.planning.given.choices import chosen_values
from shardc.planning.given.proof import MEMORY_NETWORK, PLAIN_NETWORK, RECOMPUTE_NETWORK, Proof
from shardc.planning.offers.near import Offers
from shardc.planning.recompute_network import RecomputeNetwork
from shardc.solver.loads import Relaxation
from shardc.solver.problem import evaluate
from shardc.solver.proof.certificate import Certificate
from shardc.solver.solve import Solution


def proof_of(c: Compilation, cost: float, lower_bound: float) -> Proof:
    """The proof of a compilation."""
    if c.solution is None and c.given is not None and c.given.proof is not None:
        return c.given.proof
    network, relaxed = PLAIN_NETWORK, None if c.solution is None else c.solution.relaxation
    if isinstance(c.network, RecomputeNetwork):
        network = RECOMPUTE_NETWORK if c.network.recompute else MEMORY_NETWORK
    axes = {axis for value in c.factored.base.values() for folds in value.form.folds for axis in folds}
    if relaxed is None:
        return Proof(cost, lower_bound, network, tuple(sorted(axes)))
    multipliers = {int(position): float(value) for position, value in relaxed.multipliers.items()}
    return Proof(cost, lower_bound, network, tuple(sorted(axes)), float(relaxed.capacity), multipliers)


def network_of(c: Compilation, proof: Proof, demands: LayoutDemands, offers: Offers | None = None) -> CostNetwork:
    """The network whose choice the plan is, not built yet."""
    asked = c.factored, c.mesh, c.options.device, demands
    if proof.network == PLAIN_NETWORK:
        return CostNetwork(*asked, offers=offers)
    recompute = proof.network == RECOMPUTE_NETWORK
    return RecomputeNetwork(*asked, offers=offers, recompute=recompute, states=c.states)


def posed_again(c: Compilation, proof: Proof) -> Compilation:
    """The compilation with its network built, and the solution that it has by `proof`; what the proof claims is taken,
    and `plan.check` proves it anew."""
    network = c.network
    network.build()
    problem = network.problem()
    choice = chosen_values(network, c.assignment)
    relaxation = None
    if isinstance(network, RecomputeNetwork) and proof.capacity is not None:
        relaxation = Relaxation(proof.multipliers, proof.capacity, network.memory_terms())
    cost = evaluate(problem, choice)
    solution = Solution(
        choice, cost, min(proof.lower_bound, cost), proof.lower_bound >= cost, Certificate({}), relaxation=relaxation
    )
    return replace(c, solution=solution)
