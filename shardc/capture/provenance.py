"""Where every operator of a traced graph stands: in the user's code, and before or after the turn to backward."""

from __future__ import annotations

import operator

from torch import fx

from shardc.capture import canonical
from shardc.capture.torch_patches import tracing


def by_sequence(graph: fx.Graph) -> dict[int, tuple[str, str]]:
    """Autograd's sequence number of a forward operator → where the operator stands in the user's code."""
    found: dict[int, tuple[str, str]] = {}
    for node in graph.nodes:
        if node.meta.get("nn_module_stack") and "seq_nr" in node.meta:
            found.setdefault(node.meta["seq_nr"], node.meta["nn_module_stack"])
    return found


def locate(nodes: list[fx.Node], forward_of: dict[int, tuple[str, str]]) -> None:
    """Every node gets a place: its own, that of the forward operator it differentiates, or that of an operand."""
    for node in nodes:
        place = tracing.provenance_of(node)
        if place is None and not node.meta.get("is_gradient_acc"):
            place = forward_of.get(node.meta.get("seq_nr", -1))
        if place is None:
            near = [operand.meta.get("place") for operand in node.all_input_nodes]
            place = next((p for p in reversed(near) if p), ("", ""))
        node.meta["place"] = place


def describe(old: fx.Node, new: fx.Node) -> None:
    new.meta["module"], new.meta["source"] = old.meta["place"]


def mark_phases(graph: fx.Graph, forward_results: list[fx.Node | None]) -> None:
    """Forward is what outputs and mutations need, and randomness that nobody needs; backward is the rest."""
    forward = set(canonical.live(graph, forward_results))
    for node in graph.nodes:
        if node.target is operator.getitem:
            node.meta["phase"] = node.args[0].meta["phase"]
        elif node.op == "call_function":
            node.meta["phase"] = "forward" if node in forward else "backward"
