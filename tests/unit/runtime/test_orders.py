"""Folded dims: who has what, against slicing by hand; every collective that has to do with one; what is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shardc.errors import ShardcError
from shardc.runtime import VirtualMesh, cut, paste
from shardc.runtime.collectives.all_gather import all_gather
from shardc.runtime.collectives.all_to_all import all_to_all
from shardc.runtime.collectives.collective import Held
from shardc.runtime.collectives.reduce_scatter import reduce_scatter
from shardc.runtime.collectives.reorder import reorder
from shardc.runtime.collectives.shard import shard
from shardc.runtime.mesh.orders import dealt, merged, runs_of

RANKS = (1, 2, 3, 4)
ORDERS = ("blocks", "folded")


def numbered(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def by_hand(x: Tensor, dim: int, order: str, ranks: int, rank: int) -> Tensor:
    if order == "blocks":
        return x.chunk(ranks, dim)[rank]
    pieces = x.chunk(2 * ranks, dim)
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]], dim)


def ran(ranks: int, function: Callable[[Tensor], Tensor], given: list[Tensor]) -> tuple[list[Tensor], float]:
    mesh = VirtualMesh({"a": ranks})
    return mesh.run(function, lambda rank: (given[rank],)), mesh.traffic["a"]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dim", (0, 1))
def test_dealt_and_merged(ranks: int, order: str, dim: int) -> None:
    x = numbered(24, 24)
    parts = [dealt(x, dim, order, ranks, rank) for rank in range(ranks)]
    for rank, part in enumerate(parts):
        assert torch.equal(part, by_hand(x, dim, order, ranks, rank))
        places = [place for start, length in runs_of(order, 24, ranks, rank) for place in range(start, start + length)]
        assert torch.equal(part, x.index_select(dim, torch.tensor(places)))
    assert torch.equal(merged(parts, dim, order), x)


@pytest.mark.parametrize("axes", ({"a": 2}, {"a": 3, "b": 2}, {"b": 2, "a": 4}))
def test_cut_and_paste(axes: dict[str, int]) -> None:
    """Folded within two blocks of dim 0; where there is an axis b, it deals out these blocks, or dim 1, too."""
    x, n = numbered(48, 4), axes["a"]
    cuts = ((0, 1, "b"), (0, 1, "a~folded"), (0, 1, "c")) if "b" in axes else ((0, 2, "a~folded"),)
    axes = {**axes, "c": 1}
    mesh = VirtualMesh(axes)
    parts = [cut(x, cuts, mesh.coordinates(rank), axes) for rank in mesh.ranks]
    for rank, part in enumerate(parts):
        place = mesh.coordinates(rank)
        blocks = x.chunk(2)
        folded = [by_hand(block, 0, "folded", n, place["a"]) for block in blocks]
        assert torch.equal(part, folded[place["b"]] if "b" in axes else torch.cat(folded))
    assert torch.equal(paste(parts, x.shape, cuts, axes), x)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dim", (0, 1))
def test_whole_and_folded(ranks: int, dim: int) -> None:
    x = numbered(24, 24)
    parts = [by_hand(x, dim, "folded", ranks, rank) for rank in range(ranks)]
    cut_out, sent = ran(ranks, lambda x: shard(x, dim=dim, axis="a", order="folded"), [x] * ranks)
    assert all(map(torch.equal, cut_out, parts)) and sent == 0
    gathered, _ = ran(ranks, lambda x: all_gather(x, dim=dim, axis="a", order="folded"), parts)
    assert all(torch.equal(one, x) and one.is_contiguous() for one in gathered)
    addends = [x * (rank + 1) for rank in range(ranks)]
    scattered, _ = ran(ranks, lambda x: reduce_scatter(x, dim=dim, axis="a", order="folded"), addends)
    total = x * sum(range(ranks + 1))
    assert all(torch.equal(one, by_hand(total, dim, "folded", ranks, rank)) for rank, one in enumerate(scattered))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("before", ORDERS)
@pytest.mark.parametrize("after", ORDERS)
def test_from_dim_to_dim(ranks: int, before: str, after: str) -> None:
    x = numbered(24, 48)
    parts = [by_hand(x, 0, before, ranks, rank) for rank in range(ranks)]
    told: dict[str, Any] = {"split_dim": 1, "concat_dim": 0, "split_order": after, "concat_order": before}
    moved, _ = ran(ranks, lambda x: all_to_all(x, axis="a", **told), parts)
    assert all(torch.equal(one, by_hand(x, 1, after, ranks, rank)) for rank, one in enumerate(moved))


@pytest.mark.parametrize("ranks", (*RANKS, 5, 8))
@pytest.mark.parametrize("dim", (0, 1))
def test_reorder_sends_what_changes_owner(ranks: int, dim: int) -> None:
    """The bytes told are those of the rank that sends most."""
    x = numbered(240, 240)
    blocks, folded = ([by_hand(x, dim, order, ranks, rank) for rank in range(ranks)] for order in ORDERS)
    for order, given, wanted in (("folded", blocks, folded), ("blocks", folded, blocks)):
        found, sent = ran(ranks, lambda x, order=order: reorder(x, dim=dim, axis="a", order=order), given)
        assert all(torch.equal(one, other) and one.is_contiguous() for one, other in zip(found, wanted, strict=True))
        leaves = [given[r].numel() - len({*given[r].flatten().tolist()} & {*wanted[r].flatten().tolist()})
                  for r in range(ranks)]  # fmt: skip
        assert sent == max(leaves) * x.element_size()


def test_orders_cost_copies() -> None:
    """A folded dim is put together in new memory, even where it is dim 0."""
    told = {"dim": 0, "order": "folded"}
    assert all_gather.joins(told) and all_gather.workspace(told, 10, 100, False) == 100
    assert reduce_scatter.holds(told) is Held.COPY and reduce_scatter.workspace(told, 100, 10, False) == 100
    assert all_to_all.holds({"split_dim": 0, "concat_dim": 1, "split_order": "folded"}) is Held.COPY
    assert all_to_all.joins({"split_dim": 1, "concat_dim": 0, "concat_order": "folded"})
    assert reorder.orders("blocks", "folded") == {"order": "folded"} and shard.orders("blocks", "blocks") == {}


def test_what_does_not_fold() -> None:
    with pytest.raises(ShardcError, match="does not fold over 2 ranks: 4 must divide it"):
        ran(2, lambda x: shard(x, dim=0, axis="a", order="folded"), [numbered(6)] * 2)
    with pytest.raises(ShardcError, match="no order is called 'spiral'"):
        ran(2, lambda x: shard(x, dim=0, axis="a", order="spiral"), [numbered(8)] * 2)
    with pytest.raises(ShardcError, match="does not divide into two pieces"):
        ran(2, lambda x: reorder(x, dim=0, axis="a", order="folded"), [numbered(3)] * 2)
    with pytest.raises(ShardcError, match="as axis 'a~folded' needs"):
        cut(numbered(6), ((0, 1, "a~folded"),), {"a": 0}, {"a": 2})
