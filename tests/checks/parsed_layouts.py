"""Strategies from printed layouts: which strategy of an operator demands and makes what is printed.

A strategy is written `{m@dp k@tp}`: axis `dp` splits factor m, `tp` splits k. `{pass@tp}` lets partial sums over `tp`
pass, `{s@tp by all_gather}` names the variant, `{m@dp again}` runs once more in backward. Where several strategies make
the printed layouts, the line must say which.

The operators of a lowered graph are looked at one by one, and their dims have the atoms that the printed layouts tell:
`64@tp` is one, though views of the program may have cut it into 4 x 16.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_structure

from shardc.ir.facts import Captured, describe, dtype_of, laid
from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh
from shardc.ir.program import Port, Program, Role, name_of
from shardc.ir.splits import Splits
from shardc.ir.versions import GraphVersion
from shardc.planning.cost_network import CostNetwork
from shardc.planning.strategies import strategies_of
from shardc.rules.factors.chosen import Chosen
from shardc.rules.factors.factored import Form, Key, Op
from shardc.rules.factors.factoring import VIEWS, factor
from shardc.rules.factors.strategy import Shape, Strategy, demand, make, shape_of, split_of
from shardc.rules.notation import maker_of, registered
from shardc.runtime import Part

aten = torch.ops.aten


class NoStrategy(Exception):
    """No strategy has the printed layouts, or several have."""


class Operator(NamedTuple):
    """An operator of a lowered graph, the dtype and layout of each of its results, and whether its sizes are local."""

    node: fx.Node
    results: Mapping[int, tuple[torch.dtype, Layout]]
    local: bool


def strategy_text(op: Op, strategy: Strategy, mesh: Mesh) -> str:
    """`{m@dp k@tp}`; empty where the operator runs whole on every rank."""
    several = {f.name for f in op.factors if f.index}
    words = [
        f"{f.name}{f'.{f.index}' if f.name in several else ''}@{axes[0] if len(axes) == 1 else _listed(axes)}"
        for f, axes in zip(op.factors, strategy.split, strict=True)
        if axes
    ]
    words += [f"pass@{axis}" for axis, _ in strategy.passes if mesh.sizes[axis] > 1]
    words += [f"by {strategy.variant}"] if strategy.variant else []
    words += ["again"] if strategy.again else []
    return f"{{{' '.join(words)}}}" if words else ""


def _listed(axes: tuple[str, ...]) -> str:
    return f"({','.join(axes)})"


def strategy_of(given: Operator, mesh: Mesh, told: str) -> Chosen | None:
    """The strategy that demands the printed layouts of the operands and makes those of the results; None for a view.
    Raises NoStrategy."""
    factored = factor(_one_operator(given))
    op = factored.ops[-1]
    if op.node.op == "placeholder":
        return None
    shape, operands = shape_of(op), _operands(given.node)
    if "~folded" in str([*given.results.values(), *map(laid, operands)]):  # the operator alone offers no such layout
        shape = replace(shape, factors=tuple(replace(factor, folds=mesh.names) for factor in shape.factors))

    def agrees(strategy: Strategy) -> bool:
        pairs = zip(op.operands, operands, strict=True)
        needs = all(
            _demanded(op, shape, strategy, index, mesh) == laid(node).simplify(mesh)
            for index, (_, node) in enumerate(pairs)
        )
        return needs and all(
            _same(result.value.form, make(shape, strategy, index, mesh), given.results[result.key[1]][1], mesh)
            for index, result in enumerate(op.results)
            if result.key[1] in given.results
        )

    strategies = strategies_of(shape, mesh).strategies
    body = given.node.target if not isinstance(given.node.target, torch._ops.OpOverload) else None
    body = None if body is op.node.target and not any(variant.body is body for variant in shape.variants) else body
    fitting = [one for one in strategies if agrees(one) and (body is None or _body(shape, one) is body)]
    lies = ", ".join(str(laid(node).simplify(mesh)) for node in operands)
    return Chosen(op, shape, one_of(op, fitting, mesh, told, f"demands operands that lie as {lies}, and makes this"))


def _demanded(op: Op, shape: Shape, strategy: Strategy, index: int, mesh: Mesh) -> Layout:
    """The layout in which a strategy needs an operand, as it is printed."""
    split = split_of(shape, strategy, shape.operands[index].carried)
    axes = [() if factor is None else split[factor] for factor in op.kind.carried[index]]
    form, base = op.operands[index].value.form, demand(shape, strategy, index, mesh)
    return form.layout(axes, base.partial).simplify(mesh)


def one_of(op: Op, fitting: list[Strategy], mesh: Mesh, told: str, what: str) -> Strategy:
    """The one fitting strategy, or that which a line tells. Raises NoStrategy."""
    texts = [strategy_text(op, one, mesh) for one in fitting]
    if told:
        fitting = [one for one, text in zip(fitting, texts, strict=True) if text == told]
    if not fitting:
        several = f"; these do: {', '.join(texts)}" if texts else ""
        raise NoStrategy(f"no strategy {told or 'of ' + name_of(op.node.target)} {what}{several}")
    if len(fitting) > 1 and not told:  # whole on every rank, or passing nothing on, is what is meant without a word
        plain = [one for one, text in zip(fitting, texts, strict=True) if not text]
        plain = plain or [one for one in fitting if not one.passes]
        if len(plain) != 1:
            raise NoStrategy(f"more than one strategy {what}; write which, behind the type: {' or '.join(texts)}")
        fitting = plain
    return fitting[0]


def _body(shape: Shape, strategy: Strategy) -> Any:
    variant = shape.variant_of(strategy)
    return variant.body if variant else None


def _same(form: Form, splits: Splits, printed: Layout, mesh: Mesh) -> bool:
    return form.layout_on(splits.axes, splits.partial).simplify(mesh) == printed.simplify(mesh)


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a call, one entry for each time that it is read."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, dict(node.kwargs)), found.append)
    return found


def _one_operator(given: Operator) -> Program:
    """The operator on whole operands, whose dims are cut into the atoms that the layouts tell."""
    graph, ports = fx.Graph(), list[Port]()

    def operand(node: fx.Node) -> fx.Node:
        layout, dtype = laid(node), dtype_of(node)
        if node.target is aten.expand.default:  # an expanded dim is read once, which tells in the costs
            view = graph.call_function(aten.expand.default, (operand(node.all_input_nodes[0]), list(layout.shape)))
            describe(view, Captured(torch.empty(layout.shape, dtype=dtype)))
            return view
        new = graph.placeholder(f"x{len(ports)}")
        ports.append(Port(Role.INPUT, f"input:{len(ports)}", len(ports)))
        describe(new, Captured(torch.empty([atom.size for dim in layout.dims for atom in dim], dtype=dtype)))
        if all(len(dim) == 1 for dim in layout.dims):
            return new
        view = graph.call_function(aten.view.default, (new, list(layout.shape)))
        describe(view, Captured(torch.empty(layout.shape, dtype=dtype)))
        return view

    args, kwargs = fx.map_arg((given.node.args, dict(given.node.kwargs)), operand)
    target, args, kwargs = _whole(given, args, kwargs)
    node = graph.call_function(target, args, kwargs)
    values = fx.map_arg((args, kwargs), lambda one: one.meta["facts"].value)
    made = target(*values[0], **values[1]) if isinstance(target, torch._ops.OpOverload) else _printed(given)
    describe(node, Captured(made))
    results: list[fx.Node] = [node]
    if not isinstance(made, Tensor):
        results = []
        for index, value in enumerate(made):
            if isinstance(value, Tensor):
                results.append(graph.call_function(operator.getitem, (node, index)))
                describe(results[-1], Captured(value))
    graph.output(tuple(results))
    outputs = [Port(Role.OUTPUT, "", index) for index in range(len(results))]
    spec = tree_structure(list(range(len(results))))
    return Program(GraphVersion.of(graph), ports, outputs, spec, list(range(len(results))))


def _printed(given: Operator) -> Tensor:
    """What a function of the runtime makes: the printed type."""
    dtype, layout = given.results[0]
    return torch.empty(layout.shape, dtype=dtype)


def _whole(given: Operator, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """The call on global tensors: local sizes become global ones, the body of a variant the operator whose it is."""
    target: Any = given.node.target
    if not isinstance(target, torch._ops.OpOverload) and any(isinstance(v, Part) for v in kwargs.values()):
        kwargs = {name: value for name, value in kwargs.items() if not isinstance(value, Part)}
        target = _operator_of(target, args, kwargs)
    made = given.local and not given.node.all_input_nodes
    if made or (target in VIEWS and target is not aten.permute.default):
        layout = given.results[0][1]
        args = tuple(list(layout.shape) if isinstance(argument, (list, tuple)) else argument for argument in args)
    return target, args, kwargs


def _operator_of(body: Any, args: Any, kwargs: Any) -> Any:
    """The operator of torch one of whose variants runs a body. Their names begin alike: `softmax_gathered` runs in the
    place of `aten._softmax.default`. Raises NoStrategy."""
    if maker_of(body) is not None:
        return body  # a draw is its own
    given = fx.map_arg((args, kwargs), lambda one: one.meta["facts"].value)
    for name in registered():
        space, _, rest = name.partition(".")
        called, _, overload = rest.partition(".")
        if space == "aten" and called.strip("_").split("_")[0] == body.__name__.split("_")[0]:
            target = getattr(getattr(aten, called), overload)
            maker = maker_of(target)
            try:
                rule = maker(*given[0], **given[1]) if maker else None
            except (TypeError, ValueError, IndexError, AttributeError):
                continue  # it takes other arguments
            if rule is not None and any(variant.body is body for variant in rule.variants):
                return target
    raise NoStrategy(f"no operator of torch whose name begins as that of {body.__name__} has a variant with this body")


def printed_strategy(network: CostNetwork, op: Op, layouts: Mapping[int, Layout], told: str) -> Strategy:
    """The strategy of an operator whose results lie as printed. Raises NoStrategy."""
    mesh, options = network.mesh, network.options_of(op)
    words = told.strip("{}").split()
    named = " ".join(word for word in words if word != "again")

    def agrees(strategy: Strategy) -> bool:
        return all(
            _same(result.value.form, make(options.shape, strategy, index, mesh), layouts[result.key[1]], mesh)
            for index, result in enumerate(op.results)
            if result.key[1] in layouts
        )

    printed = ", ".join(map(str, layouts.values()))
    fitting = [one for one in options.strategies if agrees(one)]
    strategy = one_of(op, fitting, mesh, f"{{{named}}}" if named else "", f"makes {printed}")
    return strategy._replace(again="again" in words)


def printed_splits(network: CostNetwork, key: Key, layout: Layout) -> Splits:
    """The layout of a base value that is printed as `layout`. Raises NoStrategy."""
    form, mesh = network.factored.base[key].form, network.mesh
    for splits in network.class_of(key).layouts:
        if _same(form, splits, layout, mesh):
            return splits
    raise NoStrategy(f"%{key[0].name} cannot lie as {layout}: its dims are {form.layout(((),) * len(form.base))}")


def made_splits(network: CostNetwork, op: Op, strategy: Strategy) -> dict[Key, Splits]:
    """The layouts of an operator's results."""
    shape = network.options_of(op).shape
    return {result.key: make(shape, strategy, index, network.mesh) for index, result in enumerate(op.results)}
