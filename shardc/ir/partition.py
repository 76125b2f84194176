"""The two functions that a lowered graph becomes: what runs in forward and in backward, in order, and what forward
leaves for backward."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from shardc.ir.facts import lowered
from shardc.ir.program import Program, Role, ancestors, forward_part


@dataclass(frozen=True)
class Partition:
    """`given` are the placeholders but the tangents; `outputs` and `gradients` what they return, None where there
    is nothing."""

    given: list[fx.Node]
    forward: list[fx.Node]
    outputs: list[fx.Node | None]
    saved: list[fx.Node]
    tangents: list[fx.Node]
    backward: list[fx.Node]
    gradients: list[fx.Node]

    @cached_property
    def operands(self) -> dict[fx.Node, list[fx.Node]]:
        """What each node of forward and backward reads; fx makes a new list whenever it is asked."""
        return {node: node.all_input_nodes for half in (self.forward, self.backward) for node in half}


def partition(graph: fx.Graph, program: Program) -> Partition:
    """Divide a graph whose placeholders and outputs are those of `program`. Forward holds what its results need, all
    draws, and what is marked `kept` for backward."""
    results: list[fx.Node | None] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    nodes = list(graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    tangents = [n for n, port in zip(placeholders, program.inputs, strict=True) if port.role is Role.TANGENT]
    given = [n for n, port in zip(placeholders, program.inputs, strict=True) if port.role is not Role.TANGENT]
    ports = list(zip(program.outputs, results, strict=True))
    outputs = [node for port, node in ports if port.role is not Role.GRADIENT]
    gradients = [node for port, node in ports if port.role is Role.GRADIENT and node is not None]
    kept = [node for node in nodes if node.op != "output" and lowered(node).kept]
    forward = forward_part(graph, program.outputs, results, kept)
    backward = ancestors(gradients, forward)
    # all results of an operator are made where it runs
    forward |= {n for n in backward if n.target is operator.getitem and n.args[0] in forward}
    at_hand = forward.union(given)
    forward.difference_update(given)
    backward -= at_hand
    wanted = {*gradients, *(operand for node in backward for operand in node.all_input_nodes)} - backward
    backward.difference_update(tangents)
    saved = [n for n in nodes if n in wanted and n in at_hand and lowered(n).layout is not None]
    return Partition(
        given, [n for n in nodes if n in forward], outputs, saved if gradients else [],
        tangents, [n for n in nodes if n in backward], gradients,
    )  # fmt: skip
