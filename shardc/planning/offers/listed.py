"""The layouts of a network whose operators are offered a part of all strategies.

mm is offered "a splits m" and "b splits n"      its result may lie as [m@a, n], [m, n@b], and whole
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from shardc.ir.program import Role
from shardc.ir.splits import Folds, Splits

if TYPE_CHECKING:
    from shardc.planning.cost_network import Assignment, CostNetwork

Atoms = tuple[tuple[int, ...], Folds]
"""The sizes of atoms, and the axes that may fold them."""
Layouts = Mapping[Atoms, Sequence[Splits]]


def listed_layouts(network: CostNetwork) -> dict[Atoms, list[Splits]]:
    """The layouts that the offered strategies demand and make, those in which gradients are stored, and those of the
    plan that the offers are near to."""
    found: defaultdict[Atoms, dict[Splits, None]] = defaultdict(dict)
    ops = {op.node: op for op in network.factored.ops}
    for options in {id(one): one for one in map(network.options_of, ops.values())}.values():
        for tensor, layouts in options.layouts():
            found[tensor.sizes, tensor.folds].update(dict.fromkeys(layouts))
    program = network.factored.program
    parameters = {port.name: node for port, node in zip(program.inputs, program.placeholders, strict=True)}
    for port, node in zip(program.outputs, program.results, strict=True):
        if node is not None and port.role is Role.GRADIENT and port.name in parameters:
            value, parameter = network.factored.values[node], parameters[port.name]
            stored = network.options_of(ops[parameter]).strategies
            layouts = [network.gradient_demand(value, parameter, Splits(strategy.split)) for strategy in stored]
            tensor = network.class_of(value.key)
            found[tensor.sizes, tensor.folds].update(dict.fromkeys(layouts))
    if network.offers is not None:
        for atoms, layouts in network.offers.layouts.items():
            found[atoms].update(dict.fromkeys(layouts))
    return {atoms: [*layouts] for atoms, layouts in found.items()}


def layouts_of(network: CostNetwork, plan: Assignment) -> dict[Atoms, list[Splits]]:
    """The layouts in which a plan shares, keeps and returns values."""
    values, results = network.factored.values, network.factored.program.results
    outputs = {values[node].key: plan.outputs[i] for i, node in enumerate(results) if node and i in plan.outputs}
    found: defaultdict[Atoms, dict[Splits, None]] = defaultdict(dict)
    for each in (plan.shares, plan.kept, plan.regathered, outputs):
        for key, splits in each.items():
            tensor = network.class_of(key)
            found[tensor.sizes, tensor.folds][splits] = None
    return {atoms: [*layouts] for atoms, layouts in found.items()}
