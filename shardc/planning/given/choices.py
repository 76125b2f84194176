"""The variables of a network that stand for what a plan says, and the choice of them that an assignment is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

from shardc.ir.splits import Splits
from shardc.planning.cost_network import Assignment, CostNetwork
from shardc.planning.recompute_network import RecomputeNetwork
from shardc.rules.factors.factored import Key
from shardc.rules.factors.strategy import Strategy, make


def share_variable(network: CostNetwork, key: Key) -> int | None:
    """The variable of the layout that the readers of a value share; None where it has one reader."""
    return network._share_variable.get(key)


def kept_variable(network: CostNetwork, key: Key) -> int | None:
    """The variable of the layout in which a value is kept for backward, or is not; None where that is no question."""
    return network._kept_variables[key][0] if _keeps(network) and key in network._kept_variables else None


def reread_variable(network: CostNetwork, key: Key) -> int | None:
    """The variable of the layout that the readers in backward share; None where there is one."""
    return network._regathered_variables[key][0] if _keeps(network) and key in network._regathered_variables else None


def output_variable(network: CostNetwork, index: int) -> int | None:
    """The variable of the layout of an output; None for gradients of parameters, which lie as these do."""
    return network._output_variable.get(index)


def _keeps(network: CostNetwork) -> TypeGuard[RecomputeNetwork]:
    return isinstance(network, RecomputeNetwork)


def chosen_values(network: CostNetwork, assignment: Assignment) -> list[int]:
    """The choice of a network that was built, of which `assignment` is the meaning."""
    choice = [0] * len(network.variables)

    def choose(number: int | None, wanted: Strategy | Splits) -> None:
        if number is not None:
            choice[number] = network.variables[number].domain.index(wanted)  # type: ignore[arg-type]

    for op in network.factored.ops:
        strategy = assignment.strategies[op.node]
        choose(network.variable_of(op.node), strategy)
        for number, result in enumerate(op.results):
            _choose_layouts(network, assignment, result.key, strategy, number, choose)
    for index, splits in assignment.outputs.items():
        choose(output_variable(network, index), splits)
    return choice


def _choose_layouts(
    network: CostNetwork, assignment: Assignment, key: Key, strategy: Strategy, number: int,
    choose: Callable[[int | None, Strategy | Splits], None],
) -> None:  # fmt: skip
    made = make(assignment.shapes[key[0]], strategy, number, network.mesh)
    choose(share_variable(network, key), assignment.shares.get(key, made))
    kept = kept_variable(network, key)
    if kept is not None:
        choose(kept, assignment.kept.get(key, network.variables[kept].domain[-1]))
        if key in assignment.kept:
            choose(reread_variable(network, key), assignment.regathered.get(key, assignment.kept[key]))
