"""Canonical ATen: a traced graph written again with one spelling for each operation.

    %t = aten.t(%w)                      ->    %permute = permute(%w, [1, 0])
    %y = aten.reshape(%x, [-1, 8])       ->    %view = view(%x, [4, 8])
    %z = aten.detach(%y)                 ->    (nothing: readers of %z read %view)

Copies that only autograd or functionalization needs vanish. Transposes become `permute`, reshapes become `view` with
the sizes written out, and every argument stands at the index that the schema gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from shardc.capture.torch_patches.attention.written import PRODUCT, WEIGHTS
from shardc.capture.torch_patches.fake_tensors import is_fake, same_shape
from shardc.ir.facts import NOWHERE, Captured, Origin, describe
from shardc.ir.program import call, value_of

aten: Any = torch.ops.aten

_COPIES = {
    aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default,
    WEIGHTS, PRODUCT,
}  # fmt: skip
_VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.unsqueeze.default, aten._reshape_alias.default, aten.unflatten.int, aten.flatten.using_ints,
}  # fmt: skip
_SAME = {aten._unsafe_index.Tensor: aten.index.Tensor, aten._unsafe_index_put.default: aten.index_put.default}
_MOVES = {
    aten.view.default, aten.permute.default, aten.expand.default, aten.slice.Tensor, aten.slice_backward.default,
}  # fmt: skip
_IRRELEVANT = ("memory_format", "layout", "pin_memory")

Target = Callable[..., Any]


class Rewriter:
    """Copies the live part of a traced graph into `graph`, node by node."""

    def __init__(self, origins: Mapping[fx.Node, Origin]) -> None:
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self._origins = origins

    def placeholder(self, old: fx.Node | None, name: str, value: Any) -> None:
        """A placeholder that stands for `old`, or for something that nothing uses yet."""
        new = placeholder(self.graph, name)
        describe(new, Captured(value))
        if old is not None:
            self.env[old] = new

    def copy(self, nodes: Iterable[fx.Node]) -> None:
        """Copy `nodes`, which must come in order."""
        for old in nodes:
            self.env[old] = self._copied(old)

    def finish(self, results: list[fx.Node | None]) -> fx.Graph:
        """The graph with its output, without the calls that have no users any more."""
        self.graph.output(tuple(results))
        for node in reversed(self.graph.nodes):
            if node.op == "call_function" and not node.users and not is_random(node):
                self.graph.erase_node(node)
        return numbered(self.graph)

    def _copied(self, old: fx.Node) -> fx.Node:
        args: Any
        kwargs: Any
        args, kwargs = fx.map_arg((old.args, dict(old.kwargs)), self.env.__getitem__)
        target: Target = old.target  # type: ignore[assignment]
        val = old.meta.get("val")
        if target in _COPIES:
            return args[0]
        if target is aten.copy.default and _alike(old.args[1], val):
            return args[1]
        if isinstance(target, torch._ops.OpOverload):
            target, args, kwargs = canonical(target, args, kwargs, val)
            args = _through(target, args)
            if _does_nothing(target, args, val):
                return args[0]
        new = call(self.graph, target, args, kwargs)
        describe(new, Captured(val, self._origins.get(old, NOWHERE)))
        return new


def placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A placeholder of `graph`, whose name and target are alike."""
    new = graph.placeholder(name)
    new.target = new.name  # the name as fx changed it: unique, and no keyword
    return new


def numbered(old: fx.Graph) -> fx.Graph:
    """The same graph with names numbered anew: erased nodes left gaps in the numbers."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in old.nodes:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
        if node.op == "placeholder":
            env[node] = placeholder(graph, node.name)
        elif node.op == "call_function":
            env[node] = call(graph, node.target, args, kwargs)
        else:
            graph.output(args[0])
            continue
        env[node].meta = node.meta
    return graph


def live(graph: fx.Graph, roots: Iterable[fx.Node | None]) -> list[fx.Node]:
    """The calls that `roots` need, in order. Random operators stay even if nothing needs them, because they advance the
    random generator."""
    needed = {root for root in roots if root is not None}
    calls: list[fx.Node] = []
    for node in reversed(graph.nodes):
        if node.op == "call_function" and (node in needed or is_random(node)):
            calls.append(node)
            needed.update(node.all_input_nodes)
    return calls[::-1]


def canonical(
    target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], val: Any
) -> tuple[Target, tuple[Any, ...], dict[str, Any]]:
    """The one spelling of a call whose result is `val`: operator, positional and keyword arguments."""
    args, kwargs = positional(target, args, kwargs)
    target = _SAME.get(target, target)
    if target in _VIEWS:
        return aten.view.default, (args[0], list(val.shape)), {}
    if target is aten.expand.default:
        return target, (args[0], list(val.shape)), {}
    order = _order(target, args)
    if order is not None:
        return aten.permute.default, (args[0], order), {}
    if target is aten._efficientzerotensor.default:  # autograd allocates no memory for these zeros
        target = aten.zeros.default
    if target in (aten.empty_strided.default, aten.empty_permuted.default):  # each rank chooses strides
        target, args = aten.empty.memory_format, (args[0],)
    if _of_default_dtype(target, kwargs, val):  # another one in forward than when the program runs
        kwargs = {**kwargs, "dtype": val.dtype}
    keep = ("memory_format",) if target is aten.clone.default else ()
    return target, args, {key: value for key, value in kwargs.items() if key in keep or key not in _IRRELEVANT}


def _of_default_dtype(target: torch._ops.OpOverload, kwargs: Mapping[str, Any], val: Any) -> bool:
    """Whether a call makes a tensor of the default dtype that there was when it was traced, and is none now."""
    if kwargs.get("dtype") is not None or not isinstance(val, torch.Tensor) or not val.is_floating_point():
        return False
    arguments = target._schema.arguments
    takes = any(argument.name == "dtype" and argument.kwarg_only for argument in arguments)
    tensors = any(isinstance(argument.type, torch.TensorType) for argument in arguments)
    return takes and not tensors and val.dtype != torch.get_default_dtype()


def positional(
    target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments at the indices that the schema gives them; keyword-only ones stay keywords."""
    if not kwargs:
        return args, kwargs
    schema = [argument for argument in target._schema.arguments if not argument.kwarg_only]
    last = max((index for index, argument in enumerate(schema) if argument.name in kwargs), default=-1)
    filled, rest = list(args), dict(kwargs)
    for argument in schema[len(args) : last + 1]:
        filled.append(rest.pop(argument.name) if argument.name in rest else argument.default_value)
    return tuple(filled), rest


def _order(target: Target, args: tuple[Any, ...]) -> list[int] | None:
    """The order of the dims if the call only permutes them, else None."""
    if not args or not isinstance(args[0], fx.Node) or not isinstance(value_of(args[0]), torch.Tensor):
        return None
    rank = value_of(args[0]).ndim
    order = list(range(rank))
    if target is aten.permute.default:
        return [dim % rank for dim in args[1]]
    if target in (aten.t.default, aten.numpy_T.default):
        return order[::-1]
    if target is aten.transpose.int and rank:
        first, second = args[1] % rank, args[2] % rank
        order[first], order[second] = second, first
        return order
    return None


def _through(target: Target, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A permute of a permute, or a view of a view, starts from the first one's operand."""
    if target not in (aten.permute.default, aten.view.default) or args[0].target is not target:
        return args
    source, inner = args[0].args
    return (source, args[1] if target is aten.view.default else [inner[dim] for dim in args[1]])


def _alike(source: Any, result: Any) -> bool:
    """Whether a value that is written over another is what comes of it."""
    value = source.meta.get("val")
    if (
        not is_fake(value)
        or not same_shape(value.shape, result.shape)
        or not same_shape(value.stride(), result.stride())
    ):
        return False
    return value.dtype == result.dtype and value.device == result.device


def _does_nothing(target: Target, args: tuple[Any, ...], val: Any) -> bool:
    """Whether the result is the operand itself."""
    if not args or not isinstance(args[0], fx.Node) or not is_fake(val):
        return False
    before = value_of(args[0])
    if target is aten._to_copy.default:
        return before.dtype == val.dtype
    if target not in _MOVES or not same_shape(before.shape, val.shape):
        return False
    return target is not aten.permute.default or args[1] == sorted(args[1])


def is_random(node: fx.Node) -> bool:
    """Whether a call advances the random generator."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
