"""Localize: from global to local.

Sizes in views, expands and factories shrink to the rank's part; indices into split tables are rebased; an operator
one of whose parted factors is split gives way to the body of the variant that was chosen.

%v = view(%x, [16384, 512])       f32[(32@dp 512), 512]     ->   %v = view(%x, [8192, 512])       (dp=2)
%e = embedding(%w, %i)            f32[32, 512] +sum@tp      ->   %j = rebase(%i, part=Part(('tp',), 128))
    with %w: f32[128@tp, 512]                                    %p = pad_dummy(%w, dim=0)
                                                                 %e = embedding(%p, %j)
%y = _softmax(%x, 1, False)       f32[32, 512@tp]           ->   %y = softmax(%x, 1, False, s=Part(('tp',), 512))
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from shardc.ir.facts import describe, laid, lowered
from shardc.ir.mesh import Mesh
from shardc.ir.precision import GRADIENT_CAST, RUNS_AS
from shardc.ir.program import call
from shardc.planning.compilation import Compilation, compiler_pass
from shardc.rules.factors.chosen import Chosen, chosen_of
from shardc.rules.factors.factored import Kind, Op
from shardc.rules.factors.strategy import Strategy, masks, split_of
from shardc.rules.notation import Size
from shardc.runtime.kernels import indexing
from shardc.runtime.kernels.parts import Part

aten = torch.ops.aten
_SIZED = {aten.view.default, aten.expand.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}

_FROM_END = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default}
"""Whose indices count from the end below zero."""


@compiler_pass
def localize(c: Compilation) -> Compilation:
    """Make the program that of one rank."""
    mesh = c.mesh
    return replace(c, lowered=c.lowered.derived("localize", lambda graph: _plain(localized(graph, mesh))))


def _plain(graph: fx.Graph) -> fx.Graph:
    """Put what runs in the place of operators that tell the planner more, in place."""
    for node in graph.find_nodes(op="call_function", target=GRADIENT_CAST):
        node.args, node.kwargs, node.target = node.args[:1], {"dtype": node.args[1]}, RUNS_AS[GRADIENT_CAST]
    return graph


def localized(graph: fx.Graph, mesh: Mesh) -> fx.Graph:
    """Make every node's arguments local, in place."""
    as_it_is: dict[tuple[Kind, Strategy], bool] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in IDENTITIES:
            _bypass(graph, node)
        elif (chosen := chosen_of(node)) is not None:  # a view too, where it cuts across atoms
            op, strategy = chosen.op, chosen.strategy
            key = op.kind, strategy
            if key not in as_it_is:
                as_it_is[key] = _is_local(chosen, mesh)
            if not as_it_is[key]:
                _operator(graph, node, chosen, mesh)
        elif node.target in _SIZED:
            node.args = (node.args[0], list(laid(node).local_shape(mesh)))
            # a squeeze names no sizes, and would also drop a dim of which the rank holds one element
            node.target = aten.expand.default if node.target is aten.expand.default else aten.view.default
    return graph


def _bypass(graph: fx.Graph, node: fx.Node) -> None:
    """Let the readers of an identity read its operand; where forward was to keep the one, it keeps the other."""
    operand: fx.Node = node.args[0]  # type: ignore[assignment]
    if lowered(node).kept:
        describe(operand, replace(lowered(operand), kept=True))
    node.replace_all_uses_with(operand)
    graph.erase_node(node)


IDENTITIES = (torch.ops.shardc.constrain.default, torch.ops.shardc.retile.default)
"""Operators that only speak to the planner; generated code does without them."""


def _is_local(chosen: Chosen, mesh: Mesh) -> bool:
    """Whether the arguments of an operator are the same for the global tensors and for a rank's parts."""
    op, strategy = chosen.op, chosen.strategy
    return not (op.rule.sizes or op.rule.indices or not chosen.is_itself or _is_uneven(op, strategy, mesh))


def _is_uneven(op: Op, strategy: Strategy, mesh: Mesh) -> bool:
    return any(f.size % mesh.ways(axes) for f, axes in zip(op.factors, strategy.split, strict=True))


def _operator(graph: fx.Graph, node: fx.Node, chosen: Chosen, mesh: Mesh) -> None:
    op, strategy = chosen.op, chosen.strategy
    split = {(f.name, f.index): axes for f, axes in zip(op.factors, strategy.split, strict=True)}
    if _is_uneven(op, strategy, mesh):
        _mask(graph, node, chosen, mesh)
    if op.rule.sizes:
        arguments = list(node.args)
        for position, meaning in op.rule.sizes.items():
            arguments[position] = _size(node, op, meaning, split, mesh)
        node.args = tuple(arguments)
    node.target, parts = chosen.runs(mesh)
    node.kwargs = {**node.kwargs, **parts}  # type: ignore[assignment]
    for name in set(op.rule.indices.values()):
        axes = split.get((name, 0), ())
        if axes:
            _rebase(graph, node, op, name, axes, mesh)


def _size(
    node: fx.Node, op: Op, meaning: Size, split: dict[tuple[str, int], tuple[str, ...]], mesh: Mesh
) -> int | list[int]:
    """A size-like argument: the local shape of result `meaning`, or the local size of the factor called so."""
    if isinstance(meaning, int):
        key = op.results[[r.key[1] for r in op.results].index(meaning)].key
        layouts = {user.args[1]: laid(user) for user in node.users if user.target is operator.getitem}
        layout = lowered(node).layout or layouts[key[1]]
        return list(layout.local_shape(mesh))
    if isinstance(meaning, tuple):
        return [n if isinstance(n, int) else _factor_size(op, n, split, mesh) for n in meaning]
    return _factor_size(op, meaning, split, mesh)


def _factor_size(op: Op, name: str, split: dict[tuple[str, int], tuple[str, ...]], mesh: Mesh) -> int:
    factors = [f for f in op.factors if f.name == name]
    return math.prod(mesh.chunk(f.size, split[f.name, f.index]) for f in factors)


def _rebase(graph: fx.Graph, node: fx.Node, op: Op, name: str, axes: tuple[str, ...], mesh: Mesh) -> None:
    """Indices outside the rank's chunk go to a dummy row: taken there they read zero, put there they are dropped."""
    sizes = [factor.size for factor in op.factors if factor.name == name]
    total, unit = math.prod(sizes), math.prod(sizes[1:])
    operands = _operand_nodes(node)
    changed: dict[int, fx.Node] = {}
    with graph.inserting_before(node):
        for index, operand in enumerate(op.operands):
            if op.rule.indices.get(index) == name:
                more: dict[str, Any] = {"part": Part(axes, total, unit)}
                more |= {"wrap": True} if node.target in _FROM_END else {}
                changed[index] = _added(graph, operands[index], indexing.rebase, (operands[index],), more)
            elif name in operand.names:
                dim = {"dim": operand.names.index(name)}
                changed[index] = _added(graph, operands[index], indexing.pad_dummy, (operands[index],), dim)
    supply = iter(changed.get(i, operands[i]) for i in range(len(operands)))
    node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda n: next(supply))
    for position, meaning in op.rule.sizes.items():
        if meaning == name:
            arguments = list(node.args)
            arguments[position] = mesh.chunk(sizes[0], axes) * unit + 1
            node.args = tuple(arguments)
    _drop(graph, node, op, name)


def _mask(graph: fx.Graph, node: fx.Node, chosen: Chosen, mesh: Mesh) -> None:
    """Fill the padding of operands that would otherwise get into the result."""
    op, strategy = chosen.op, chosen.strategy
    operands = _operand_nodes(node)
    with graph.inserting_before(node):
        for index, operand in enumerate(op.operands):
            split = split_of(chosen.shape, strategy, chosen.shape.operands[index].carried)
            for position, value in masks(chosen.shape, strategy, index, mesh).items():
                factor, axes = op.factors[position], split[position]
                pairs = zip(op.factors, split, strict=True)
                before = [(f, held) for f, held in pairs if f.name == factor.name and f.index < factor.index]
                outer = math.prod(mesh.chunk(f.size, held) for f, held in before)
                for dim in [i for i, name in enumerate(operand.names) if name == factor.name]:
                    more = {"dim": dim, "part": Part(axes, factor.size), "value": value}
                    more |= {"outer": outer} if outer > 1 else {}
                    operands[index] = _added(graph, operands[index], indexing.fill, (operands[index],), more)
    supply = iter(operands)
    node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda n: next(supply))


def _added(graph: fx.Graph, like: fx.Node, target: Callable[..., Any], args: Any, kwargs: Any = None) -> fx.Node:
    """A call whose result lies as `like` does."""
    new = call(graph, target, args, kwargs)
    describe(new, replace(lowered(like), operator=None))
    return new


def _operand_nodes(node: fx.Node) -> list[fx.Node]:
    operands: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), operands.append)
    return operands


def _drop(graph: fx.Graph, node: fx.Node, op: Op, name: str) -> None:
    result = op.results[0]
    if name not in result.names:
        return
    with graph.inserting_after(node):
        cut = call(graph, indexing.drop_dummy, (node,), {"dim": result.names.index(name)})
    describe(cut, replace(lowered(node), operator=None))
    node.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)
