"""torch's decompositions, for operators that have neither a rule nor a decomposition in shardc.

    %y = addr(%b, %u, %v)      ->   %o = mul(view(%u, [8, 1]), %v);  %y = add(%b, %o)

If any operator in a decomposition has no rule in the end, the original operator stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from shardc.capture.canonical import Rewriter
from shardc.ir.facts import Captured, describe
from shardc.ir.program import call, value_of

aten = torch.ops.aten

KEPT = ("attention", "batch_norm", "dropout", "rrelu", "multilabel_margin")
"""Parts of the names of operators that are never decomposed. Their backward reads results of the fused forward, or they
draw random numbers, or torch's decomposition computes something else."""


def body_of(node: fx.Node) -> fx.Graph | None:
    """The decomposition of a call as a graph of canonical operators.

    Its placeholders are the call's tensors, in order. Its output is the call's result: a node, or a tuple of nodes and
    None. None if torch has no usable decomposition.
    """
    target = node.target
    if not isinstance(target, OpOverload) or not _decomposable(target):
        return None
    decomposition = decomposition_table.get(target) or getattr(target, "impl_aten", None)  # prims carry theirs
    if decomposition is None:
        return None
    try:
        traced = _trace(decomposition, node)
    except Exception:  # a decomposition may raise anything on tensors that it does not support
        return None
    return _canonical(traced)


def _decomposable(target: OpOverload) -> bool:
    name = target._schema.name
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not (random or target._schema.is_mutable or any(part in name for part in KEPT))


def _trace(decomposition: Callable[..., Any], node: fx.Node) -> fx.GraphModule:
    """The decomposition, traced on the call's fake values. Its constants become attributes."""
    fakes: list[FakeTensor] = []
    fx.map_arg((node.args, node.kwargs), lambda n: fakes.append(value_of(n)))

    def function(*tensors: torch.Tensor) -> Any:
        supply = iter(tensors)
        args, kwargs = _plain(node.args, supply), {k: _plain(v, supply) for k, v in node.kwargs.items()}
        results = decomposition(*args, **kwargs)
        return tuple(results) if isinstance(results, (tuple, list)) else results

    with tree_leaves(value_of(node))[0].fake_mode:
        return make_fx(function)(*fakes)


def _plain(argument: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """An argument with tensors in place of nodes. Lists are copied, since decompositions may write to them."""
    if isinstance(argument, fx.Node):
        return next(tensors)
    if isinstance(argument, (list, tuple)):
        items = [_plain(item, tensors) for item in argument]
        return items if isinstance(argument, list) else tuple(items)
    return argument


def _canonical(traced: fx.GraphModule) -> fx.Graph | None:
    """The traced graph in canonical operators; None if it has more than operators and single numbers."""
    rewriter = Rewriter({})
    for old in traced.graph.nodes:
        if old.op == "placeholder":
            rewriter.placeholder(old, old.name, old.meta["val"])
        elif old.op == "get_attr":
            number = getattr(traced, str(old.target))
            if not isinstance(number, torch.Tensor) or number.numel() != 1:
                return None
            rewriter.env[old] = _constant(rewriter.graph, number)
        elif old.op == "call_function":
            rewriter.copy([old])
    results = traced.graph.output_node().args[0]
    several = isinstance(results, (tuple, list))
    if not all(r is None or isinstance(r, fx.Node) for r in (results if several else [results])):
        return None
    rewriter.graph.output(fx.map_arg(results, rewriter.env.__getitem__))
    rewriter.graph.eliminate_dead_code()
    return rewriter.graph


def _constant(graph: fx.Graph, number: torch.Tensor) -> fx.Node:
    # a fake tensor made from a constant keeps its value
    known = number.constant if isinstance(number, FakeTensor) else number
    arguments = list(number.shape), known.item()  # type: ignore[union-attr]
    node = call(graph, aten.full.default, arguments, {"dtype": number.dtype, "device": number.device})
    describe(node, Captured(aten.full.default(*arguments, dtype=number.dtype, device=number.device)))
    return node
