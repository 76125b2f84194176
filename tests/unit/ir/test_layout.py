"""Meshes and layouts: text, order of axes, DTensor, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard

from shardc import B, Layout, Mesh, P, S
from shardc.errors import LayoutError, MeshError
from shardc.ir.layout import Atom, describe, parse_typed

MESH = Mesh.parse("dp=2,tp=4")


def test_mesh_text() -> None:
    assert str(MESH) == "dp=2,tp=4"
    assert (MESH.names, MESH.size) == (("dp", "tp"), 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dp2", "cannot read 'dp2'"),
        ("dp=x", "cannot read 'dp=x'"),
        ("dp=0", "size 0"),
        ("dp=2,dp=2", "names an axis twice"),
    ],
)
def test_mesh_refuses(text: str, message: str) -> None:
    with pytest.raises(MeshError, match=message):
        Mesh.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "f32[]",
        "f32[32@dp, 512, 4096] +sum@tp",
        "bf16[32@(dp,tp), 7]",
        "i64[(4@dp 512@tp), 16]",
        "f64[(4 512@(tp,dp))] +max@cp",
    ],
)
def test_text_round_trip(text: str) -> None:
    dtype, layout = parse_typed(text)
    assert describe(torch.empty(0, dtype=dtype), layout) == text


@pytest.mark.parametrize(
    "text",
    [
        "f32[8@dp@tp]", "f32[8@]", "f32[8@dp,]", "[8 8]", "[(8, 8)]", "[8@(dp tp)]", "[8@(dp,)]", "[8@()]", "[08]",
        "[-8]",
        "[8]]", "[[8]]", "[8] +sum", "[8] sum@tp", "[8@3]", "[8x8]", "[8] garbage", "g32[8]", "torch.nothing[8]",
        "8, 8", "",
        "[(8@dp 4]", "[8@dp)]", "[8.5]", "[8@dp:1]", "[8@dp~spiral]", "[8@dp] @tp",
    ],
)  # fmt: skip
def test_a_text_that_is_more_or_less_than_a_layout_is_refused(text: str) -> None:
    with pytest.raises(LayoutError, match=r"cannot read layout|unknown dtype"):
        Layout.parse(text)


def test_text_may_be_spaced_as_one_likes() -> None:
    spaced = " torch.float8_e8m0fnu[ ( 4@dp  512@( tp , cp ) ) ,7 ,(8)] +sum@ep+max@pp "
    assert str(Layout.parse(spaced)) == "[(4@dp 512@(tp,cp)), 7, 8] +sum@ep +max@pp"


def test_placements_of_a_layout() -> None:
    layout = Layout.of((32, 512), MESH, {"dp": S(0), "tp": P()})
    assert str(layout) == "[32@dp, 512] +sum@tp"
    assert (layout.placement("dp"), layout.placement("tp")) == (S(0), P("sum"))
    assert Layout.whole((3,)).placement("dp") is B
    assert layout.local_shape(MESH) == (16, 512)


def test_order_of_axes_is_part_of_the_layout() -> None:
    one, other = Layout.parse("[32@(dp,tp)]"), Layout.parse("[32@(tp,dp)]")
    assert one != other
    assert one.simplify(MESH) != other.simplify(MESH)
    assert one.to_dtensor(MESH) == (Shard(0), Shard(0))
    assert Layout.from_dtensor(other.to_dtensor(MESH), (32,), MESH) == other


def test_atoms_that_are_wholly_split_merge() -> None:
    assert Layout.parse("[(2@dp 16@tp)]").simplify(MESH) == Layout.parse("[32@(dp,tp)]")
    assert Layout.parse("[(4@dp 8)]").simplify(MESH) == Layout.parse("[32@dp]")
    assert Layout.parse("[(4 8@dp)]").simplify(MESH) == Layout((((Atom(4)), Atom(8, ("dp",))),))


def test_dtensor_placements() -> None:
    layout = Layout.of((8, 8), MESH, {"dp": P(), "tp": S(1)})
    assert layout.to_dtensor(MESH) == (Partial("sum"), Shard(1))
    assert Layout.from_dtensor((Partial("sum"), Shard(1)), (8, 8), MESH) == layout
    assert Layout.from_dtensor((Replicate(), Replicate()), (8, 8), MESH) == Layout.whole((8, 8))


def test_dtensor_cannot_express_two_pieces_of_one_dim() -> None:
    with pytest.raises(LayoutError, match="DTensor cannot express"):
        Layout.parse("[(8@tp 8@dp)]").to_dtensor(MESH)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cp": S(0)}, "no axis 'cp'; it has dp, tp"),
        ({"dp": S(2)}, "out of range"),
    ],
)
def test_layout_refuses(given: dict[str, S], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Layout.of((6, 8), MESH, given)


def test_an_uneven_dim_is_padded() -> None:
    layout = Layout.of((6, 8), MESH, {"dp": S(0), "tp": S(0)})
    assert layout.local_shape(MESH) == (1, 8)
    assert Layout.of((7, 8), MESH, {"dp": S(0)}).to_dtensor(MESH) == (Shard(0), Replicate())
    with pytest.raises(LayoutError, match="stands before others"):
        Layout.parse("[(5@tp 3), 8]").cuts(MESH)


def test_an_axis_is_used_once() -> None:
    with pytest.raises(LayoutError, match="uses axis 'dp' twice"):
        Layout.parse("[8@dp, 8@dp]").check(MESH)
