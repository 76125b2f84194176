"""Provenance: where every operator of a traced graph stands in the user's code, and whether it is forward or backward.

%mm      = mm(%x, %w)             layers.0.mlp, model.py:41, forward
%mm_1    = mm(%grad, %w_t)        layers.0.mlp, model.py:41, backward: autograd made it for %mm
"""

from __future__ import annotations

import operator

from torch import fx

from shardc.capture import canonical
from shardc.capture.torch_patches.provenance_mode import provenance_of
from shardc.ir.facts import Captured, Origin, captured, describe, origin


def by_sequence(graph: fx.Graph) -> dict[int, tuple[str, str]]:
    """By autograd's sequence number of a forward operator: its module path and source line."""
    provenance: dict[int, tuple[str, str]] = {}
    for node in graph.nodes:
        if node.meta.get("nn_module_stack") and "seq_nr" in node.meta:
            provenance.setdefault(node.meta["seq_nr"], node.meta["nn_module_stack"])
    return provenance


def located(nodes: list[fx.Node], forward_of: dict[int, tuple[str, str]]) -> dict[fx.Node, Origin]:
    """The origin of every node. A node that was not given one takes that of the forward operator that it
    differentiates, or else that of its last operand."""
    origins: dict[fx.Node, Origin] = {}
    for node in nodes:
        place = provenance_of(node)
        if place is None and not node.meta.get("is_gradient_acc"):
            place = forward_of.get(node.meta.get("seq_nr", -1))
        if place is None:
            near = [origins[operand] for operand in node.all_input_nodes if operand in origins]
            place = (near[-1].module, near[-1].source) if near else ("", "")
        origins[node] = origin(*place)
    return origins


def mark_phases(graph: fx.Graph, forward_results: list[fx.Node | None]) -> None:
    """Mark as forward what outputs and mutations need, and random operators that nothing needs; the rest is
    backward."""
    forward = set(canonical.live(graph, forward_results))
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            phase = captured(node.args[0]).origin.phase
        else:
            phase = "forward" if node in forward else "backward"
        known = captured(node)
        place = origin(known.origin.module, known.origin.source, phase)
        describe(node, Captured(known.value, place, known.strides))
