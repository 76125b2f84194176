"""The verifier on simplified programs: what each fault of `simplify` would leave."""

from __future__ import annotations

from typing import Any

import torch

from checks.verifying import assert_breaks, left
from shardc.ir.facts import describe, laid, lowered
from shardc.ir.invariants import layouts, simple
from shardc.ir.program import call

aten = torch.ops.aten


def test_a_call_that_lost_its_readers() -> None:
    simplified = left("heads", "simplify")
    view = simplified.first(aten.view.default)
    with simplified.graph.inserting_before(view):
        other = call(simplified.graph, view.target, view.args)
    describe(other, lowered(view))
    view.replace_all_uses_with(other)
    assert_breaks(simplified, simple.what_is_computed_is_read, view, "has no reader")


def test_a_view_that_changes_nothing() -> None:
    simplified = left("heads", "simplify")
    view = simplified.first(aten.view.default)
    with simplified.graph.inserting_after(view):
        again = call(simplified.graph, view.target, (view, view.args[1]))
    describe(again, lowered(view))
    view.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    assert_breaks(simplified, simple.views_change_something, again, f"makes {laid(view)} of the same")


def test_a_permutation_that_changes_nothing() -> None:
    simplified = left("mlp", "simplify")
    permute = simplified.first(aten.permute.default)
    with simplified.graph.inserting_after(permute):
        again = call(simplified.graph, permute.target, (permute, [0, 1]))
    describe(again, lowered(permute))
    permute.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    assert_breaks(simplified, simple.views_change_something, again, "of the same")


def test_backward_that_reads_what_forward_was_to_let_go() -> None:
    """As merging a call of backward with its equal in forward would."""
    memory = left("memory", "simplify")
    nodes = [node for node in memory.graph.nodes if node.op == "call_function"]
    made: dict[Any, Any] = {}
    for node in nodes:
        key = node.target, tuple(operand.name for operand in node.all_input_nodes)
        first = made.setdefault((key, str(node.kwargs)), node)
        backward = lowered(node).origin.phase == "backward" and lowered(first).origin.phase == "forward"
        if backward and not lowered(first).kept and node.target not in (aten.view.default, aten.permute.default):
            reader = next(iter(node.users))
            node.replace_all_uses_with(first)
            memory.graph.erase_node(node)
            assert_breaks(memory, layouts.backward_finds_what_it_reads, reader, "is read in backward")
            return
    raise AssertionError("nothing is computed again in backward")
