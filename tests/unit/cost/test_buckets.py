"""What buckets of gradients cost, and what of it computing hides."""

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
from shardc.runtime import all_gather, all_reduce, reduce_scatter
from shardc.runtime.collectives.collective import AnyCollective

KINDS: tuple[AnyCollective, ...] = (all_reduce, reduce_scatter)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("device", "mesh"), [("h100", "dp=8"), ("h100", "dp=64"), ("cpu", "dp=4"), ("tpu_v5p", "dp=16")]
)
def test_a_full_bucket_pays_little_for_latency(device: str, mesh: str, kind: AnyCollective) -> None:
    buckets = Buckets(Axes.parse(mesh), hardware(device))
    full = buckets.full(kind, "dp")
    rate = min(line.per_byte for line in buckets.device.collective_lines(kind, buckets.mesh, "dp"))
    assert buckets.alone(kind, "dp", full) == pytest.approx((1 + SLACK) * rate * full)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_fill_buckets_equally(kind: AnyCollective) -> None:
    buckets = Buckets(Axes.parse("dp=8"), hardware("h100"))
    full, small = buckets.full(kind, "dp"), buckets.full(kind, "dp") / 40
    assert buckets.fill(kind, "dp", [small] * 10) == pytest.approx(10 * small)
    assert buckets.fill(kind, "dp", [small] * 100) == pytest.approx(100 * small / 3)
    assert buckets.fill(kind, "dp", [small, small, 10 * full]) == pytest.approx(2 * small)  # the large one stays alone
    assert buckets.fill(kind, "dp", [10 * full]) == buckets.fill(kind, "dp", []) == 0
    assert not buckets.joins(kind, "dp", 10 * full, full) and buckets.joins(kind, "dp", small, full)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_add_up_to_buckets(kind: AnyCollective) -> None:
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
        seconds = sharing.seconds(all_reduce, "dp", rows * 1e3, 1.0)
        hidden = sharing.hidden(all_reduce, "dp", rows * 1e3, 1.0)
        assert hidden == pytest.approx(device.inside.overlap * (1.0 - last))
        assert made.seconds[made.index[start], made.index[end]] == pytest.approx((1.0 - hidden) * seconds)
        assert [step.collective for step in made.path(start, end)] == [all_reduce]


def test_of_a_bucket_less_is_lost_to_the_stall_than_of_single_ones() -> None:
    """A bucket stalls what is computed beside it once. One that takes no longer than its stall hides nothing."""
    mesh, near = Axes.parse("dp=4"), hardware("h100").inside
    alone = Buckets(mesh, hardware("h100")).alone(all_reduce, "dp", 1e5)
    for stall, hides in ((0.0, near.overlap), (0.25 * alone, near.overlap - 0.25), (2 * alone, 0.0)):
        buckets = Buckets(mesh, replace(hardware("h100"), inside=replace(near, stall=stall)))
        assert buckets.hidden(all_reduce, "dp", 1e5, 0.0) == pytest.approx(hides)
        long = buckets.alone(all_reduce, "dp", 1e7)
        assert buckets.hidden(all_reduce, "dp", 1e5, 1e7) == pytest.approx(near.overlap - stall / long)
        gathered = buckets.hidden(all_gather, "dp", 1e5, 0.0)
        assert Sharing(buckets, (1e5,) * 4).hidden(all_gather, "dp", 1e5, 1.0) == pytest.approx(0.75 * gathered)


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


def test_filling_a_bucket_costs_a_copy_where_none_would_be_made_otherwise() -> None:
    mesh, size = Axes.parse("dp=4"), 1e6
    for name, copied in (("cpu", ()), ("h100", (reduce_scatter,))):  # gloo's reduce-scatter is an all-reduce of a copy
        buckets = Buckets(mesh, hardware(name))
        for kind in KINDS:
            copy = 2 * size / buckets.device.memory_bandwidth if kind in copied else 0.0
            expected = buckets.alone(kind, "dp", size) + buckets.device.launch + copy
            assert buckets.seconds(kind, "dp", size) == pytest.approx(expected)


def test_what_fills_a_bucket_by_itself_stays_alone() -> None:
    buckets = Buckets(Axes.parse("dp=8"), hardware("h100"))
    full = buckets.full(all_reduce, "dp")
    assert not buckets.joins(all_reduce, "dp", full, full) and buckets.joins(all_reduce, "dp", 0.9 * full, full)
    assert buckets.least(all_reduce, "dp", full, full) == buckets.alone(all_reduce, "dp", full)


def test_gradients_of_some_hundred_kilobytes_travel_together_between_processes() -> None:
    """As those of DDP do: nine megabytes of 32 gradients, in three buckets. Of the last layer, the weight is sent while
    backward still runs, and the bias alone behind it."""
    with torch.device("meta"):
        layers = [nn.Linear(384, 384) for _ in range(16)]
        model, x = nn.Sequential(*layers), torch.empty(512, 384)
        rows = {str(layer): ("dp", None) for layer in range(16)}
        whole: dict[str, tuple[None, ...]] = {"*.weight": (None, None), "*.bias": (None,)}
        made = shardc.compile(model, "dp=4", (x,), hardware="cpu", constraints=whole | rows)
    assert made.code.count("= all_reduce_bucket") == 3 and made.code.count("= all_reduce") == 5
