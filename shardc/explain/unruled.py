"""Operators without a rule, for the plan: the rule that trial found, or what it costs to run them on whole operands."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from shardc.analysis.conversions import Conversion
from shardc.explain.plan import Tried
from shardc.ir.program import where
from shardc.planning.cost_network import Assignment, CostNetwork
from shardc.rules.factors.chosen import chosen_of


def tried(
    network: CostNetwork, assignment: Assignment, graph: fx.Graph, conversions: Iterable[Conversion]
) -> tuple[Tried, ...]:
    """An entry of the plan for every operator whose rule was found by trial. `graph` is the one that `reshard`
    wrote."""
    steps = {step.name: step for step in conversions if step.sent}
    entries: list[Tried] = []
    for node in graph.nodes:
        chosen = chosen_of(node)
        if chosen is None or (learned := chosen.op.learned) is None:
            continue
        op = chosen.op
        options = network.options_of(op)
        seconds = float(options.compute[options.strategies.index(assignment.strategies[op.node])])
        gathers = [steps[step] for step in sorted(_moved_before(node, steps))]
        entries.append(
            Tried(
                str(op.node.target), where(op.node), str(learned), learned.replicated, seconds,
                sum(step.seconds for step in gathers), sum(step.sent for step in gathers),
            )
        )  # fmt: skip
    return tuple(entries)


def _moved_before(node: fx.Node, steps: Iterable[str]) -> set[str]:
    """The names of all collectives that convert the operands of a node."""
    names: set[str] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        if source.op == "call_function" and chosen_of(source) is None and source.name not in names:
            if source.name in steps:
                names.add(source.name)
            waiting += source.all_input_nodes
    return names
