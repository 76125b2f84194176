"""Checks that an operator makes of its result, as values of the graph.

`torch.linalg.inv` is a factorisation and a check that it worked. A trace threads tokens through such checks, so that no
pass drops or moves them. Here the result itself goes through its check:

    %inv, %info = linalg_inv_ex(%x)                                       %inv, %info = linalg_inv_ex(%x)
    %token1, _ = with_effects(%token, _linalg_check_errors, %info)   ->   %sure = checked(%inv, %info, "linalg.inv")
    %y = mm(%inv, %b)                                                     %y = mm(%sure, %b)
"""

from __future__ import annotations

import operator

import torch
from torch import fx

# AOTAutograd marks tokens among inputs and outputs with these classes only, and threads them with this operator.
from torch._functorch._aot_autograd import descriptors
from torch._higher_order_ops.effects import with_effects

from shardc.errors import CaptureError
from shardc.ir.program import call
from shardc.runtime.kernels.checks import checked

aten = torch.ops.aten

_TOKENS = (descriptors.ForwardTokenAOTInput, descriptors.BackwardTokenAOTInput)
_TOKENS_OUT = (descriptors.ForwardTokenAOTOutput, descriptors.BackwardTokenAOTOutput)


def replace_checks(traced: fx.GraphModule) -> None:
    """Replace every check in a traced graph, and take its tokens out of inputs and outputs, in place.

    Raises CaptureError for other operators with effects (printing and the like).
    """
    graph = traced.graph
    output = graph.output_node()
    described = output.meta["desc"]
    kept = [i for i, what in enumerate(described) if not isinstance(what, _TOKENS_OUT)]
    if len(kept) == len(described):
        return
    output.args = (type(output.args[0])([output.args[0][i] for i in kept]),)  # type: ignore[index]
    output.meta["desc"] = type(described)([described[i] for i in kept])
    for node in reversed(list(graph.nodes)):
        if node.target is with_effects:
            _replace(graph, node)
    for node in reversed(list(graph.nodes)):
        dead = node.op == "placeholder" and isinstance(node.meta["desc"], _TOKENS)
        if dead or (node.target is with_effects or _of_effects(node)):
            graph.erase_node(node)


def _of_effects(node: fx.Node) -> bool:
    return node.target is operator.getitem and node.args[0].target is with_effects  # type: ignore[union-attr]


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    """Send the first used result of the operator that `node` checks through `checked`."""
    _, target, *arguments = node.args
    if target is not aten._linalg_check_errors.default:
        raise CaptureError(f"the program calls {target}, which does more than compute: it cannot be sharded")
    info, name = arguments
    source: fx.Node = info.args[0]  # type: ignore[union-attr]
    results = [user for user in source.users if user is not info and user.target is operator.getitem]
    if not results:
        return  # the program uses no result that is checked
    result = min(results, key=lambda user: user.args[1])  # type: ignore[arg-type]
    readers = list(result.users)
    with graph.inserting_after(max(info, result)):  # type: ignore[type-var]
        matrix = bool(node.kwargs.get("is_matrix"))
        new = call(graph, checked._opoverload, (result, info, name, matrix))
    new.meta = dict(result.meta)
    for reader in readers:
        reader.replace_input_with(result, new)
