"""Buckets by themselves: what they cost, and that they move what collectives of single tensors would."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc.cost.buckets import SLACK, Buckets, Sharing
from shardc.cost.conversion import TensorClass
from shardc.cost.hardware import hardware
from shardc.ir.mesh import Mesh as Axes
from shardc.ir.splits import Splits
from shardc.runtime import (
    RankError,
    VirtualMesh,
    all_reduce,
    all_reduce_bucket,
    reduce_scatter,
    reduce_scatter_bucket,
)

KINDS = ("all_reduce", "reduce_scatter")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("device", "mesh"), [("h100", "dp=8"), ("h100", "dp=64"), ("cpu", "dp=4"), ("tpu_v5p", "dp=16")]
)
def test_a_full_bucket_pays_little_for_latency(device: str, mesh: str, kind: str) -> None:
    buckets = Buckets(Axes.parse(mesh), hardware(device))
    full = buckets.full(kind, "dp")
    rate = min(line.per_byte for line in buckets.device.collective_lines(kind, buckets.mesh, "dp"))
    assert buckets.alone(kind, "dp", full) == pytest.approx((1 + SLACK) * rate * full)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_fill_buckets_equally(kind: str) -> None:
    buckets = Buckets(Axes.parse("dp=8"), hardware("h100"))
    full, small = buckets.full(kind, "dp"), buckets.full(kind, "dp") / 40
    assert buckets.fill(kind, "dp", [small] * 10) == pytest.approx(10 * small)
    assert buckets.fill(kind, "dp", [small] * 100) == pytest.approx(100 * small / 3)
    assert buckets.fill(kind, "dp", [small, small, 10 * full]) == pytest.approx(2 * small)  # the large one stays alone
    assert buckets.fill(kind, "dp", [10 * full]) == buckets.fill(kind, "dp", []) == 0
    assert not buckets.joins(kind, "dp", 10 * full, full) and buckets.joins(kind, "dp", small, full)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_add_up_to_buckets(kind: str) -> None:
    """Of equal gradients; one that no other joins costs what it costs alone."""
    buckets = Buckets(Axes.parse("dp=4,tp=2"), hardware("h100"))
    sharing = Sharing(buckets, (1e5,) * 20)
    for part in (1.0, 0.5):
        shares = 20 * sharing.seconds(kind, "dp", part * 1e5, part)
        assert shares == pytest.approx(buckets.seconds(kind, "dp", 20 * part * 1e5))
        assert shares < 20 * buckets.alone(kind, "dp", part * 1e5)
    assert Sharing(buckets, (1e5,)).seconds(kind, "dp", 1e5, 1.0) == buckets.alone(kind, "dp", 1e5)


def test_backward_hides_gradients_by_their_bytes() -> None:
    """Of conversions of 1 ms and 5 ms: all but the rank's own work, and no more than its share of backward."""
    mesh, device = Axes.parse("dp=4"), hardware("h100")
    sharing = Sharing(Buckets(mesh, device), (1e6, 3e6), 2e-3 / 4e6)
    seconds, own = np.array([0.0, 1e-3, 5e-3, math.inf]), np.array([0.0, 4e-4, 1e-3, math.inf])
    assert sharing.exposed(seconds, own, 1e6) == pytest.approx([0.0, 5e-4, 4.5e-3, math.inf])
    assert sharing.exposed(seconds, own, 3e6) == pytest.approx([0.0, 4e-4, 3.5e-3, math.inf])


def test_the_last_gradients_have_nothing_left_to_hide_beneath() -> None:
    """Of four large ones the last; of small ones that share a bucket all."""
    mesh, device = Axes.parse("dp=4"), hardware("h100")
    start, end = Splits(((), ()), (("dp", "sum"),)), Splits(((), ()))
    for rows, last in ((10**6, 0.25), (10, 1.0)):
        sharing = Sharing(Buckets(mesh, device), (rows * 1e3,) * 4, 1.0)
        made = TensorClass((rows, 250), 4, ("sum",), mesh, device, sharing)
        seconds = sharing.seconds("all_reduce", "dp", rows * 1e3, 1.0)
        hidden = sharing.hidden("all_reduce", "dp", rows * 1e3, 1.0)
        assert hidden == pytest.approx(device.inside.overlap * (1.0 - last))
        assert made.seconds[made.index[start], made.index[end]] == pytest.approx((1.0 - hidden) * seconds)
        assert [step.kind for step in made.path(start, end)] == ["all_reduce"]


def test_of_a_bucket_less_is_lost_to_the_stall_than_of_single_ones() -> None:
    """A bucket stalls what is computed beside it once. One that takes no longer than its stall hides nothing."""
    mesh, near = Axes.parse("dp=4"), hardware("h100").inside
    alone = Buckets(mesh, hardware("h100")).alone("all_reduce", "dp", 1e5)
    for stall, hides in ((0.0, near.overlap), (0.25 * alone, near.overlap - 0.25), (2 * alone, 0.0)):
        buckets = Buckets(mesh, replace(hardware("h100"), inside=replace(near, stall=stall)))
        assert buckets.hidden("all_reduce", "dp", 1e5, 0.0) == pytest.approx(hides)
        long = buckets.alone("all_reduce", "dp", 1e7)
        assert buckets.hidden("all_reduce", "dp", 1e5, 1e7) == pytest.approx(near.overlap - stall / long)
        gathered = buckets.hidden("all_gather", "dp", 1e5, 0.0)
        assert Sharing(buckets, (1e5,) * 4).hidden("all_gather", "dp", 1e5, 1.0) == pytest.approx(0.75 * gathered)


@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,tp=2"])
def test_a_gradient_without_elements_hides_nothing(mesh: str) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.empty = nn.Linear(8, 8), nn.Parameter(torch.empty(0, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).sum() + (x @ self.empty.t()).sum()

    model = shardc.shard(Partly(), mesh=mesh)
    model(torch.randn(4, 8)).backward()
    assert model.empty.grad is not None and model.empty.grad.shape == (0, 8)


def parts(rank: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = [torch.arange(24.0).reshape(4, 6), torch.ones(()), torch.arange(7.0), torch.zeros(0, 4), torch.eye(5).t()]
    return [(part + rank).to(dtype) for part in made]


@pytest.mark.parametrize("op", ["sum", "max"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_reduce_bucket(ranks: int, op: str) -> None:
    mesh = VirtualMesh({"a": ranks})
    joined = mesh.run(lambda given: all_reduce_bucket(given, axis="a", op=op), lambda rank: (parts(rank),))
    traffic = dict(mesh.traffic)
    mesh.reset()
    single = mesh.run(lambda given: [all_reduce(x, axis="a", op=op) for x in given], lambda rank: (parts(rank),))
    for own, expected in zip(joined, single, strict=True):
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(own, expected, strict=True))
    assert mesh.traffic == pytest.approx(traffic)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_reduce_scatter_bucket(ranks: int) -> None:
    """Each along its own dim, one of them padded."""
    mesh, dims = VirtualMesh({"a": ranks}), (1, 0, 1)
    sizes = (None, math.ceil(7 / ranks), math.ceil(5 / ranks))

    def given(rank: int) -> tuple[list[Tensor]]:
        return ([parts(rank)[index] for index in (0, 2, 4)],)

    joined = mesh.run(lambda own: reduce_scatter_bucket(own, dims=dims, axis="a", sizes=sizes), given)
    traffic = dict(mesh.traffic)
    mesh.reset()
    told = list(zip(dims, sizes, strict=True))
    single = mesh.run(
        lambda own: [
            reduce_scatter(x, dim=dim, axis="a", chunk=size) for x, (dim, size) in zip(own, told, strict=True)
        ],
        given,
    )
    for own, expected in zip(joined, single, strict=True):
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(own, expected, strict=True))
    assert mesh.traffic == pytest.approx(traffic)


def test_pieces_may_be_written_to() -> None:
    def run() -> list[float]:
        one, other = all_reduce_bucket([torch.ones(2), torch.ones(3)], axis="a")
        one.mul_(5.0)
        return [*one.tolist(), *other.tolist()]

    assert VirtualMesh({"a": 2}).run(run, lambda _: ()) == [[10.0, 10.0, 2.0, 2.0, 2.0]] * 2


def test_what_is_no_bucket() -> None:
    mesh = VirtualMesh({"a": 2})
    one = torch.ones(4)
    for given, words in (
        (lambda: all_reduce_bucket([one, one.double()], axis="a"), "one dtype, not torch.float32, torch.float64"),
        (lambda: all_reduce_bucket([], axis="a"), "one dtype, not none at all"),
        (lambda: all_reduce_bucket([one], axis="a", op="mean"), "no reduction 'mean'"),
        (lambda: all_reduce_bucket([one], axis="b"), "no axis 'b'"),
        (lambda: reduce_scatter_bucket([one, one], dims=[0], axis="a"), "2 tensors has 1 dims and 2 sizes"),
        (lambda: reduce_scatter_bucket([one[:3]], dims=[0], axis="a"), "does not split evenly into 2 chunks"),
    ):
        with pytest.raises(RankError, match=words):
            mesh.run(given, lambda _: ())
