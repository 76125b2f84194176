"""The verifier on programs with layouts: one thing is broken in a copy, and it says which, and where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from checks.verifying import Left, assert_breaks, left
from shardc.ir.facts import FACTS, Captured, describe, lowered
from shardc.ir.invariants import layouts, order, shapes, structure
from shardc.ir.layout import Layout
from shardc.ir.program import call
from shardc.runtime.collectives.all_gather import all_gather
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.runtime.collectives.all_reduce_bucket import all_reduce_bucket
from shardc.runtime.collectives.collective import wait
from shardc.runtime.kernels.parts import Part

aten = torch.ops.aten


@pytest.fixture
def mlp() -> Left:
    return left("mlp", "reshard")


def changed(node: fx.Node, **changes: Any) -> None:
    describe(node, replace(lowered(node), **changes))


def relaid(node: fx.Node, text: str) -> None:
    changed(node, layout=Layout.parse(text))


def returned(broken: Left, index: int, node: fx.Node) -> None:
    """Let a node be the output of that index."""
    output = broken.graph.output_node()
    results: Any = list(output.args[0])  # type: ignore[arg-type]
    results[index] = node
    output.args = (tuple(results),)


def test_a_node_without_facts(mlp: Left) -> None:
    del mlp.node("relu").meta[FACTS]
    assert_breaks(mlp, layouts.facts_are_lowered, mlp.node("relu"), "has no facts")


def test_facts_of_another_stage(mlp: Left) -> None:
    describe(mlp.node("relu"), Captured(torch.empty(32, 64)))
    assert_breaks(mlp, layouts.facts_are_lowered, mlp.node("relu"), "facts of another stage, Captured")


def test_a_node_without_layout_that_is_read(mlp: Left) -> None:
    changed(mlp.node("mm"), layout=None)
    assert_breaks(mlp, layouts.facts_are_lowered, mlp.node("mm"), "%constrain reads it as one tensor")


def test_an_operand_that_is_made_too_late(mlp: Left) -> None:
    mlp.node("relu").append(mlp.node("constrain"))
    assert_breaks(mlp, structure.operands_come_first, mlp.node("relu"), "reads %constrain")


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("[32@dp, 64@dp]", "uses axis 'dp' twice"),
        ("[32@dp, 64@tp] +sum@tp", "uses axis 'tp' twice"),
        ("[32@dp, 64@pp]", "has no axis 'pp'"),
        ("[32, 64] +sum@dp +max@tp", "is partial by max and sum"),
        ("[32, 64] +mean@dp", "is partial by mean"),
        ("[(1@dp 32), 64@tp]", "1@dp has nothing for some ranks"),
    ],
)
def test_a_layout_that_cannot_be(mlp: Left, layout: str, said: str) -> None:
    relaid(mlp.node("relu"), layout)
    assert_breaks(mlp, layouts.layouts_are_well_formed, mlp.node("relu"), said)


def test_an_operator_that_lies_otherwise_than_its_strategy_makes_it(mlp: Left) -> None:
    relaid(mlp.node("relu"), "[32, 64@tp]")
    said = "lies as [32, 64@tp], its strategy makes [32@dp, 64@tp]"
    assert_breaks(mlp, layouts.results_lie_as_made, mlp.node("relu"), said)


def test_an_input_that_lies_otherwise(mlp: Left) -> None:
    relaid(mlp.node("input_0"), "[32, 16]")
    assert_breaks(mlp, layouts.results_lie_as_made, mlp.node("input_0"), "its strategy makes [32@dp, 16]")


def test_a_shape_that_is_not_that_of_the_value(mlp: Left) -> None:
    relaid(mlp.node("relu"), "[64@dp, 64@tp]")
    assert_breaks(mlp, layouts.values_keep_their_shape, mlp.node("relu"), "of shape [64, 64], its value [32, 64]")


def test_a_dtype_that_is_not_that_of_the_value(mlp: Left) -> None:
    changed(mlp.node("all_reduce"), dtype=torch.float64)
    assert_breaks(mlp, layouts.values_keep_their_shape, mlp.node("all_reduce"), "is torch.float64")


def test_a_node_of_no_value(mlp: Left) -> None:
    changed(mlp.node("relu"), base=None)
    assert_breaks(mlp, layouts.values_keep_their_shape, mlp.node("relu"), "no value of the captured program")


def test_an_operator_without_strategy(mlp: Left) -> None:
    changed(mlp.node("relu"), operator=None)
    assert_breaks(mlp, layouts.every_call_is_known, mlp.node("relu"), "has no strategy")


def test_a_sum_that_is_dropped(mlp: Left) -> None:
    """`pow` would square the addends."""
    mlp.node("all_reduce").replace_all_uses_with(mlp.node("mm_1"))
    said = "reads %mm_1, which is partial by sum over tp, and is not linear in it"
    assert_breaks(mlp, layouts.partial_values_are_summed, mlp.node("pow_1"), said)


def test_a_product_of_two_partial_operands() -> None:
    """A sum of products is not the product of sums."""
    heads = left("heads", "reshard")
    heads.node("mm_16").args = (heads.node("mm_16").args[0], heads.node("view_20"))
    heads.node("mm_17").args = (heads.node("view_20"), heads.node("view_21"))
    assert_breaks(heads, layouts.partial_values_are_summed, heads.node("mm_17"), "%view_20, %view_21")


def test_a_conversion_that_is_dropped(mlp: Left) -> None:
    mlp.node("sum_1").args = (mlp.node("pow_1"), *mlp.node("sum_1").args[1:])
    said = "needs %pow_1 as [32, 16], which lies as [32@dp, 16]"
    assert_breaks(mlp, layouts.operands_lie_as_demanded, mlp.node("sum_1"), said)


def test_an_operand_too_many(mlp: Left) -> None:
    relu = mlp.node("relu")
    relu.args = (relu.args[0], relu.args[0])
    assert_breaks(mlp, layouts.operands_lie_as_demanded, relu, "has 2 operands, its strategy 1")


def test_a_sum_over_another_axis(mlp: Left) -> None:
    mlp.node("all_reduce").kwargs = {"axis": "dp"}
    said = "no all_reduce over dp leads from [32@dp, 16] +sum@tp to [32@dp, 16]"
    assert_breaks(mlp, layouts.conversions_do_what_they_say, mlp.node("all_reduce"), said)


def test_another_reduction(mlp: Left) -> None:
    mlp.node("all_reduce").kwargs = {"axis": "tp", "op": "max"}
    assert_breaks(mlp, layouts.conversions_do_what_they_say, mlp.node("all_reduce"), "no all_reduce over tp leads")


def test_another_collective(mlp: Left) -> None:
    gather = mlp.node("all_gather")
    gather.target, gather.kwargs = all_reduce, {"axis": "dp"}
    assert_breaks(mlp, layouts.conversions_do_what_they_say, gather, "no all_reduce over dp leads")


def test_a_gather_along_another_dim(mlp: Left) -> None:
    gather = mlp.node("all_gather")
    gather.kwargs = {"dim": 1, "axis": "dp"}
    assert_breaks(mlp, layouts.conversions_do_what_they_say, gather, "is a move along {'dim': 0}, not {'dim': 1}")


def test_a_conversion_that_changes_more_than_it_says(mlp: Left) -> None:
    relaid(mlp.node("all_reduce_2"), "[16, 64]")
    said = "all_reduce over dp leads to [16, 64@tp]"
    assert_breaks(mlp, layouts.conversions_do_what_they_say, mlp.node("all_reduce_2"), said)


def test_a_gather_that_keeps_the_padding() -> None:
    uneven = left("uneven", "localize")
    node = next(node for node in uneven.graph.nodes if "size" in node.kwargs)
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "size"}
    assert_breaks(uneven, layouts.conversions_do_what_they_say, node, "of a part")


def test_a_view_that_lies_otherwise_than_its_operand(mlp: Left) -> None:
    relaid(mlp.node("permute"), "[16, 64]")
    said = "lies as [16, 64], its operand %up_weight as [64@tp, 16]"
    assert_breaks(mlp, layouts.views_lie_as_their_operand, mlp.node("permute"), said)


def test_dims_in_another_order(mlp: Left) -> None:
    mlp.node("permute").args = (mlp.node("up_weight"), [0, 1])
    assert_breaks(mlp, layouts.views_lie_as_their_operand, mlp.node("permute"), "lies as [16, 64@tp]")


def test_heads_that_are_split_in_the_wrong_piece() -> None:
    heads = left("heads", "localize")
    relaid(heads.node("view_3"), "[4, 8, 4, 4@tp]")
    said = "lies as [4, 8, 4, 4@tp], its operand %mm as"
    assert_breaks(heads, layouts.views_lie_as_their_operand, heads.node("view_3"), said)


def test_a_view_of_another_shape(mlp: Left) -> None:
    expand = mlp.first(aten.expand.default)
    expand.args = (expand.args[0], [16, 16])
    assert_breaks(mlp, shapes.global_shapes_follow, expand, "makes the shape [16, 16], its layout tells [32, 16]")


def test_a_conversion_of_another_value(mlp: Left) -> None:
    changed(mlp.node("all_reduce"), base=lowered(mlp.node("pow_1")).base)
    assert_breaks(
        mlp, shapes.conversions_keep_the_value, mlp.node("all_reduce"), "of another value than its operand %mm_1"
    )


def test_an_output_that_is_partial(mlp: Left) -> None:
    returned(mlp, 1, mlp.node("mm_4"))
    said = "is the gradient up.weight, and lies as [64@tp, 16] +sum@dp"
    assert_breaks(mlp, layouts.outputs_are_complete, mlp.node("mm_4"), said)


def test_a_gradient_in_another_layout_than_its_parameter(mlp: Left) -> None:
    summed = mlp.node("all_reduce_1")
    with mlp.graph.inserting_before(mlp.graph.output_node()):
        gathered = call(mlp.graph, all_gather, (summed,), {"dim": 0, "axis": "tp"})
    describe(gathered, replace(lowered(summed), layout=Layout.parse("[64, 16]")))
    returned(mlp, 1, gathered)
    assert_breaks(mlp, layouts.gradients_lie_as_parameters, gathered, "lies as [64, 16], %up_weight as [64@tp, 16]")


def test_an_output_that_needs_a_tangent(mlp: Left) -> None:
    returned(mlp, 0, mlp.node("all_reduce_1"))
    expand = mlp.first(aten.expand.default)
    assert_breaks(mlp, structure.forward_needs_no_tangents, expand, "reads the tangent %tangent_0")


def test_a_value_that_backward_reads_and_forward_does_not_keep() -> None:
    memory = left("memory", "reshard")
    kept = [node for node in memory.graph.nodes if node.op != "output" and lowered(node).kept]
    node = next(node for node in kept if node.name == "addmm_2")
    changed(node, kept=False)
    reader = next(user for user in memory.graph.nodes if node in user.all_input_nodes)
    assert reader.target is aten.view.default
    assert_breaks(memory, layouts.backward_finds_what_it_reads, node, "is read in backward, and is not kept for it")


def test_sizes_that_are_still_global() -> None:
    local = left("mlp", "localize")
    expand = local.first(aten.expand.default)
    expand.args = (expand.args[0], [32, 16])
    assert_breaks(local, shapes.sizes_are_local, expand, "names sizes [32, 16], a part is [16, 16]")


def test_a_factory_whose_size_is_still_global() -> None:
    local = left("lookup", "localize")
    lookup = local.first(aten.embedding_dense_backward.default)
    lookup.args = (*lookup.args[:2], 31, *lookup.args[3:])
    assert_breaks(local, shapes.local_shapes_follow, lookup, "makes the shape [31, 8], its layout tells [32, 8]")


def test_a_constraint_that_is_left() -> None:
    local = left("mlp", "localize")
    with local.graph.inserting_before(local.node("relu")):
        node = call(local.graph, torch.ops.shardc.constrain.default, (local.node("mm"), "dp,tp"))
    describe(node, lowered(left("mlp", "reshard").node("constrain")))
    assert_breaks(local, shapes.only_what_runs_is_left, node, "runs nothing, and is still there")


def test_a_split_factor_without_its_body() -> None:
    local = left("lookup", "localize")
    node = local.node("softmax")
    node.target = aten._softmax.default
    assert_breaks(local, shapes.split_factors_have_their_body, node, "runs aten._softmax.default, its strategy")


def test_a_body_that_is_told_of_another_part() -> None:
    local = left("lookup", "localize")
    node = local.node("softmax")
    node.kwargs = {"s": Part(("tp",), 16)}
    assert_breaks(local, shapes.split_factors_have_their_body, node, "is to be told of {'s': Part(('tp',), 32)}")


def test_a_piece_of_a_bucket_that_is_taken_twice() -> None:
    buckets = left("buckets", "bucket")
    bucket = buckets.first(all_reduce_bucket)
    first, second = list(bucket.users)[:2]
    second.args = first.args
    assert_breaks(buckets, order.bucket_pieces_are_taken_once, bucket, "its piece 0 is taken 2 times")


def test_a_piece_of_a_bucket_that_nobody_takes() -> None:
    buckets = left("buckets", "bucket")
    bucket = buckets.first(all_reduce_bucket)
    bucket.args = ([*bucket.args[0], bucket.args[0][0]],)  # type: ignore[misc, index]
    changed(bucket, members=(*lowered(bucket).members, lowered(bucket).members[0]))
    assert_breaks(buckets, order.bucket_pieces_are_taken_once, bucket, "its piece 6 is taken 0 times")


def test_pieces_in_each_others_place() -> None:
    buckets = left("buckets", "bucket")
    bucket = buckets.first(all_reduce_bucket)
    first, second = list(bucket.users)[:2]
    first.args, second.args = second.args, first.args
    said = "is of another value than member 1 of %all_reduce_bucket"
    assert_breaks(buckets, order.bucket_pieces_are_taken_once, first, said)


def test_members_of_different_dtypes() -> None:
    buckets = left("buckets", "bucket")
    bucket = buckets.first(all_reduce_bucket)
    changed(bucket.all_input_nodes[0], dtype=torch.float64)
    assert_breaks(buckets, order.bucket_members_are_alike, bucket, "torch.float32, torch.float64")


def test_a_bucket_whose_facts_name_other_members() -> None:
    buckets = left("buckets", "bucket")
    bucket = buckets.first(all_reduce_bucket)
    changed(bucket, members=lowered(bucket).members[1:])
    assert_breaks(buckets, order.bucket_members_are_alike, bucket, "its facts name 5 members")


def test_a_bucket_over_another_axis() -> None:
    joined = left("mlp", "bucket")
    bucket = joined.first(all_reduce_bucket)
    bucket.kwargs = {"axis": "tp"}
    piece = next(iter(bucket.users))
    assert_breaks(joined, layouts.conversions_do_what_they_say, piece, "no all_reduce over tp leads")


@pytest.fixture
def overlap() -> Left:
    return left("overlap", "overlap")


def test_a_read_before_the_wait(overlap: Left) -> None:
    landed = overlap.first(wait)
    started: Any = landed.args[0]
    reader = next(iter(landed.users))
    reader.replace_input_with(landed, started)
    said = f"reads %{started.name}, which is under way until %wait"
    assert_breaks(overlap, order.what_is_started_is_awaited, reader, said)


def test_two_waits(overlap: Left) -> None:
    landed = overlap.first(wait)
    started: Any = landed.args[0]
    with overlap.graph.inserting_after(landed):
        describe(call(overlap.graph, wait, (started,)), lowered(landed))
    assert_breaks(overlap, order.what_is_started_is_awaited, started, "is awaited by %wait, %wait_2")


def test_a_wait_before_the_start(overlap: Left) -> None:
    landed = overlap.first(wait)
    started: Any = landed.args[0]
    started.prepend(landed)
    assert_breaks(overlap, structure.operands_come_first, landed, f"reads %{started.name}, which is not made before it")


def test_a_wait_for_what_was_not_started(overlap: Left) -> None:
    landed = overlap.first(wait)
    landed.args = (overlap.node("tanh"),)
    assert_breaks(overlap, order.what_is_started_is_awaited, landed, "awaits %tanh, which is no collective")


def test_what_is_under_way_is_not_kept(overlap: Left) -> None:
    started: Any = overlap.first(wait).args[0]
    changed(started, kept=True)
    assert_breaks(overlap, order.what_is_started_is_awaited, started, "what is kept is its wait")


def test_backward_before_the_end_of_forward(overlap: Left) -> None:
    early = overlap.first(aten.expand.default)
    overlap.node("tanh").append(early)
    said = "is of backward, and stands before %div of forward"
    assert_breaks(overlap, order.forward_runs_before_backward, early, said)
