"""Reductions of gradients: what of backward only makes gradients, and what of that may wait for the last backward.

    %g = mm(%t, %x)                              f32[512, 256] +sum@dp     every backward
    %r = reduce_scatter(%g, dim=0, axis=dp)      f32[512@dp, 256]          once, of the sum of all %g

Sums, gathers, views and casts may be made of the sum of several backwards as well as of each of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import fx

from shardc.analysis.operands import collective_of
from shardc.ir.facts import Lowered, describe, lowered
from shardc.ir.partition import Partition, partition
from shardc.ir.program import Port, Program, Role, call
from shardc.ir.versions import GraphVersion, copied
from shardc.runtime.collectives.bucket import Bucket

_CASTS = (torch.ops.aten._to_copy.default,)


def passes_on(node: fx.Node) -> bool:
    """Whether a node only passes values on: views, conversions, casts."""
    if lowered(node).operator is not None and node.target not in _CASTS:
        return False
    return isinstance(node.target, Bucket) or len(node.all_input_nodes) == 1


def becoming_gradients(run: Partition, graph: fx.Graph) -> set[fx.Node]:
    """The collectives, views and casts of backward whose results only become gradients."""
    waiting: set[fx.Node] = set()
    output, gradients = graph.output_node(), set(run.gradients)
    for node in reversed(run.backward):
        if passes_on(node) and all(user in waiting or (user is output and node in gradients) for user in node.users):
            waiting.add(node)
    return waiting


class Deferral(NamedTuple):
    """What of backward waits for the last one. `cuts` are the values that stay as they are until then, by the number of
    the gradient among the program's outputs; `nodes` is what makes gradients of their sums, in order."""

    cuts: dict[int, fx.Node]
    nodes: list[fx.Node]


def deferral_of(graph: fx.Graph, program: Program) -> Deferral:
    """What may wait of a simplified graph: the collectives of parameters' gradients, and all that follows them."""
    run = partition(graph, program)
    results: list[fx.Node | None] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    made = {
        index: node for index, (port, node) in enumerate(zip(program.outputs, results, strict=True))
        if node is not None and port.role is Role.GRADIENT
    }  # fmt: skip
    at_once = {node for index, node in made.items() if program.outputs[index].name not in program.trained}
    waiting = {node for node in becoming_gradients(run, graph) if _adds_up(node)} - at_once
    for node in reversed(run.backward):  # what others than these read is made at once
        if node in waiting and any(user.op != "output" and user not in waiting for user in node.users):
            waiting.discard(node)
    nodes = dict.fromkeys(_from_first_collective(run.backward, waiting))
    cuts: dict[int, fx.Node] = {}
    for index, node in made.items():
        cut = node
        while cut in nodes:
            (cut,) = cut.all_input_nodes
        if cut is not node:
            cuts[index] = cut
    return Deferral(cuts, list(nodes))


def _adds_up(node: fx.Node) -> bool:
    """Whether a node makes of a sum the sum of what it makes of the addends."""
    return node.kwargs.get("op", "sum") == "sum"


def _from_first_collective(nodes: Iterable[fx.Node], waiting: set[fx.Node]) -> Iterable[fx.Node]:
    """What waits and sends something, and what follows it: before that, a rank's part is smaller or no larger."""
    behind: set[fx.Node] = set()
    for node in nodes:
        collective = collective_of(node)
        sends = collective is not None and not collective.local
        if node in waiting and (sends or not behind.isdisjoint(node.all_input_nodes)):
            behind.add(node)
            yield node


def _without(graph: fx.Graph, deferral: Deferral) -> fx.Graph:
    """The graph with the gradients as they are before what waits; written in place."""
    output = graph.output_node()
    results: list[fx.Node | None] = list(output.args[0])  # type: ignore[arg-type]
    for index, cut in deferral.cuts.items():
        results[index] = cut
    output.args = (tuple(results),)
    for node in reversed(deferral.nodes):
        graph.erase_node(node)
    return graph


def every_backward(graph: fx.Graph, program: Program, deferral: Deferral) -> tuple[fx.Graph, Program]:
    """A copy of the graph without what waits, and the program of it."""
    names = frozenset(program.outputs[index].name for index in deferral.cuts)
    made = copied(graph)
    return _without(made, deferral_of(made, program)), replace(program, deferred=names)


def epilogue(graph: fx.Graph, deferral: Deferral, program: Program) -> tuple[fx.Graph, Program]:
    """What waits as a program of its own: from the sums, which are its tangents, to the gradients."""
    results: list[fx.Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    made, here = fx.Graph(), dict[fx.Node, fx.Node]()
    ports: list[Port] = []
    for index, cut in deferral.cuts.items():
        ports.append(Port(Role.TANGENT, program.outputs[index].name, index))
        placeholder = made.placeholder(f"sum_{index}")
        facts = lowered(cut)
        describe(placeholder, Lowered(facts.origin, facts.dtype, facts.layout, facts.base))
        here.setdefault(cut, placeholder)
    for node in deferral.nodes:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), here.__getitem__)
        here[node] = call(made, node.target, args, kwargs)
        describe(here[node], lowered(node))
    made.output(tuple(here[results[index]] for index in deferral.cuts))
    outputs = [program.outputs[index] for index in deferral.cuts]
    rest = replace(program, inputs=ports, outputs=outputs, out_leaves=[], attached=frozenset(), effects=None)
    return made, replace(rest, version=GraphVersion.of(made))
