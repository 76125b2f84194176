"""Normalize: rewrite operators that have no rule, or a rule too narrow, into ones that have.

Means become global sums divided by the global count, so they stay right however the dim is split; random masks become
factories of global shape, drawn from the single device's stream or from seeds (`randomness`). What only backward reads
is made there.

    %m = mean(%x, [1])                 ->   %s = sum(%x, [1]);  %m = div(%s, 512)
    %y, %k = native_dropout(%x, 0.1)   ->   %g = bernoulli_state([32, 512]);  %k = bernoulli(%g, [32, 512], 0.9)
                                            %y = mul(mul(%x, %k), 1.11)
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from shardc.ir.facts import Captured, captured, describe, origin_of
from shardc.ir.program import Program, Role, forward_part, value_of
from shardc.planning.compilation import Compilation, compiler_pass
from shardc.rules.factors.factoring import VIEWS
from shardc.rules.notation import maker_of
from shardc.rules.rewrites.borrowed import body_of
from shardc.rules.rewrites.builder import Builder, Values
from shardc.rules.rewrites.decompositions import DECOMPOSITIONS
from shardc.rules.rewrites.routing import BALANCED, RoutingOptions
from shardc.runtime.kernels.random import DRAWS, INDEPENDENT


@compiler_pass
def normalize(c: Compilation) -> Compilation:
    """Replace every operator that has a decomposition."""
    asked = c.options
    routing = RoutingOptions(asked.capacity, asked.overflow, asked.imbalance)
    return replace(c, program=normalized(c.program, routing, independent=c.randomness == INDEPENDENT))


def normalized(program: Program, routing: RoutingOptions = BALANCED, *, independent: bool = False) -> Program:
    """The program in operators that have rules. `routing` is what its experts are told; random numbers are the single
    device's, or `independent` of them."""
    version = program.version.derived("normalize", lambda graph: _normalized(graph, program, routing, independent))
    return replace(program, version=version)


def _normalized(graph: fx.Graph, program: Program, routing: RoutingOptions, independent: bool) -> fx.Graph:
    """Replace every operator that has a decomposition, in place; drop what became dead."""
    _rewrite(graph, Values(), independent)
    routing.tell(graph)
    for node in reversed(graph.nodes):
        # draws stay, needed or not: they move the random stream
        if not node.users and node.op == "call_function" and node.target not in DRAWS:
            graph.erase_node(node)
    _make_late(graph, program)
    return graph


def _make_late(graph: fx.Graph, program: Program) -> None:
    """Move what stands in forward, though only backward reads it, to its first reader. Autograd writes there what it
    saves in a form of its own (a clone, for one); at the start of backward it would be in the way of running layers
    again one after the other."""
    nodes, results = list(graph.nodes), graph.output_node().args[0]
    placeholders = [node for node in nodes if node.op == "placeholder"]
    pairs = zip(placeholders, program.inputs, strict=True)
    reached = {node for node, port in pairs if port.role is Role.TANGENT}
    forward = forward_part(graph, program.outputs, results)  # type: ignore[arg-type]
    early: list[fx.Node] = []
    for node in nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            break
        makes = node.op == "call_function" and node not in forward
        if makes and not (node.target is operator.getitem and node.args[0] in forward):
            early.append(node)
    if reached:
        for node in reversed(early):
            min(node.users).prepend(node)


def _rewrite(graph: fx.Graph, values: Values, independent: bool = False) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        decomposition = DECOMPOSITIONS.get(node.target)
        if decomposition is None and _known(node):
            continue
        with graph.inserting_before(node):
            builder = Builder(graph, node, values, independent=independent)
            if decomposition is not None:
                results = decomposition(builder, *node.args, **node.kwargs)
            else:
                results = _borrowed(graph, node, values)
            results = _cast(builder, results, value_of(node)) if results is not None else None
        if results is not None:
            _replace(node, results)


def _known(node: fx.Node) -> bool:
    """Whether planning can take the operator as it is."""
    return node.target in VIEWS or maker_of(node.target) is not None


def _borrowed(graph: fx.Graph, node: fx.Node, values: Values) -> Any:
    """torch's own decomposition of a call, if all that it comes down to is known; None if not."""
    body = body_of(node)
    if body is None:
        return None
    _rewrite(body, values)
    calls = [inner for inner in body.nodes if inner.op == "call_function"]
    if not all(inner.target is operator.getitem or _known(inner) for inner in calls):
        return None
    given: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), given.append)
    places = dict(zip((n for n in body.nodes if n.op == "placeholder"), given, strict=True))
    for inner in calls:
        new = places[inner] = graph.node_copy(inner, places.__getitem__)
        describe(new, Captured(value_of(inner), origin_of(node)))
    return fx.map_arg(body.output_node().args[0], places.__getitem__)


def _cast(builder: Builder, results: Any, wanted: Any) -> Any:
    """The results in the types that the operator would have given them: some are computed in wider ones."""
    if isinstance(results, fx.Node):
        return builder.cast(results, wanted.dtype)
    pairs = zip(results, wanted, strict=True)
    return tuple(builder.cast(r, w.dtype) if isinstance(r, fx.Node) and w is not None else r for r, w in pairs)


def _replace(node: fx.Node, results: Any) -> None:
    if not isinstance(results, (tuple, list)):
        _remember_strides(node, results)
        node.replace_all_uses_with(results)
        node.graph.erase_node(node)
        return
    for user in list(node.users):
        assert user.target is operator.getitem
        replacement = results[user.args[1]]  # type: ignore[index]
        assert isinstance(value_of(replacement), torch.Tensor)
        _remember_strides(user, replacement)
        user.replace_all_uses_with(replacement)
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _remember_strides(node: fx.Node, replacement: fx.Node) -> None:
    """Eager draws random numbers in the order of its own memory, which a decomposition need not keep."""
    if value_of(node).stride() != value_of(replacement).stride():
        known = captured(replacement)
        if known.strides is None:
            describe(replacement, Captured(known.value, known.origin, value_of(node).stride()))
