"""What the variants of attention send, as published, and what they take: nothing of it is written in the planner."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import shardc
from checks import forced
from checks.closed_forms import BYTES
from shardc.cost.hardware import Hardware, Link, hardware

BATCH, LENGTH, WIDTH = 2, 48, 2


class Sequences(nn.Module):
    """Attention between operators that work on split sequences, with `shared` queries for each head of keys."""

    def __init__(self, kv_heads: int, shared: int, axes: tuple[str, ...], causal: bool = False) -> None:
        super().__init__()
        heads = (kv_heads, shared) if shared > 1 else (kv_heads,)
        self.q = nn.Parameter(torch.randn(BATCH, *heads, LENGTH, WIDTH, dtype=torch.float64))
        self.k, self.v = (nn.Parameter(torch.randn(BATCH, kv_heads, LENGTH, WIDTH, dtype=torch.float64)) for _ in "kv")
        self.axes, self.causal = axes, causal

    def _split(self, x: Tensor) -> Tensor:
        return shardc.constrain(x, (*[None] * (x.dim() - 2), self.axes, None))

    def forward(self) -> Tensor:
        q, k, v = (self._split(x.sin()) for x in (self.q, self.k, self.v))
        out, _ = torch.ops.shardc.attention(q, k, v, None, None, None, self.causal, 0.5, 0, 0.0, 0.0)
        return self._split(out).cos()


def sent(kv_heads: int, shared: int, mesh: str, accepts: forced.Accepts) -> tuple[float, Counter[str]]:
    """A, the bytes of a rank's part of the queries; and what a rank sends for attention and its gradients, by axis."""
    axes = tuple(axis.partition("=")[0] for axis in mesh.split(","))
    model = Sequences(kv_heads, shared, axes)
    weights = {name: (*[None] * (p.dim() - 2), axes, None) for name, p in model.named_parameters()}
    with forced.attention(accepts):
        compiled = shardc.compile(model, mesh, (), constraints=weights, hardware=BYTES, outputs="sharded")
    compiled().sum().backward()
    assert compiled.plan.bytes_per_axis == pytest.approx(compiled.executable.mesh.traffic)
    ranks = compiled.plan.mesh.size
    return model.q.nbytes / ranks, Counter(compiled.plan.bytes_per_axis)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("kv_heads", "shared"), [(8, 1), (4, 2)])
def test_ulysses(ranks: int, kv_heads: int, shared: int) -> None:
    """Forward 2 (1 + r) A (U - 1) / U, with r heads of keys for one of queries; backward the same. With r = 1: 8 A
    (U - 1) / U in all. Jacobs et al. 2023; Fang and Zhao, "USP", 2024."""
    part, found = sent(kv_heads, shared, f"a={ranks}", forced.ulysses("a"))
    assert found["a"] == pytest.approx(4 * (1 + 1 / shared) * part * (ranks - 1) / ranks)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("kv_heads", "shared"), [(6, 1), (2, 3), (1, 6)])
def test_ring(ranks: int, kv_heads: int, shared: int) -> None:
    """Forward (R - 1) 2 r A; backward the same for keys and values, and R 2 r A for their gradients."""
    part, found = sent(kv_heads, shared, f"a={ranks}", forced.ring("a"))
    assert found["a"] == pytest.approx(2 / shared * part * (ranks - 1 + ranks - 1 + ranks))


@pytest.mark.parametrize(("kv_heads", "shared"), [(4, 1), (2, 4)])
def test_usp(kv_heads: int, shared: int) -> None:
    """Heads over one axis and a ring over the other send what each sends alone: A is that of all ranks."""
    part, found = sent(kv_heads, shared, "a=3,b=2", forced.hybrid("a", "b"))
    assert found["b"] == pytest.approx(4 * (1 + 1 / shared) * part / 2)
    assert found["a"] == pytest.approx(2 / shared * part * (2 + 2 + 3))


def test_a_ring_over_two_axes_goes_round_the_last_one_most() -> None:
    part, found = sent(4, 1, "a=2,b=3", forced.ring("a", "b"))
    block = 2 * part
    assert found["b"] == pytest.approx(block * (2 * 2 * 2 + 4 + 1))  # and home: five steps along b are two short of six
    assert found["a"] == pytest.approx(block * (1 + 1 + 2))


def device(overlap: float, bandwidth: float = 1e9) -> Hardware:
    link = Link(1e-6, bandwidth, overlap=overlap)
    flops = {"float64": 1e9, "float32": 1e9}
    return replace(hardware("h100"), inside=link, between=link, launch=0.0, flops=flops)


def planned(mesh: str, accepts: forced.Accepts, causal: bool, hardware: Hardware) -> shardc.Plan:
    with torch.no_grad(), forced.attention(accepts):
        model = Sequences(4, 1, ("a",), causal)
        weights = {name: (None, None, ("a",), None) for name in ("q", "k", "v")}
        return shardc.compile(model, mesh, (), constraints=weights, hardware=hardware, outputs="sharded").plan


def seconds_of(plan: shardc.Plan, name: str = "attention") -> float:
    """Seconds of compute of attention."""
    value = next(value for value in plan.explainer.value_names.values() if value == "getitem")  # type: ignore[union-attr]
    return plan.why(value).compute


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_half_of_the_square_counts_and_the_slowest_rank(ranks: int) -> None:
    """The last rank of n has (2 n - 1) / n of the mean; heads that are split have the mean."""
    heads = planned(f"a={ranks}", forced.ulysses("a"), True, device(0.0)) if ranks != 3 else None
    whole, split = (planned(f"a={ranks}", forced.gathered("a"), causal, device(0.0)) for causal in (False, True))
    ring = planned(f"a={ranks}", forced.ring("a"), True, device(0.0))
    mean = seconds_of(whole) / 2
    assert seconds_of(split) == pytest.approx(mean * (2 * ranks - 1) / ranks, rel=0.03)
    assert seconds_of(ring) == pytest.approx(mean * (2 * ranks - 1) / ranks, rel=0.03)
    if heads is not None:
        assert seconds_of(heads) == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bandwidth", [1e5, 1e8, 1e12])
@pytest.mark.parametrize("causal", [False, True])
def test_a_step_of_a_ring_takes_the_longer_of_computing_and_sending(
    overlap: float, bandwidth: float, causal: bool
) -> None:
    """The objective is what the timeline predicts of the code, and of what it does without; so says the formula."""
    there = device(overlap, bandwidth)
    plan = planned("a=4", forced.ring("a"), causal, there)
    assert plan.predicted == pytest.approx(plan.cost - plan.simplified, rel=1e-9)
    hops = [one.seconds for one in plan.conversions if one.kind == "permute"]
    assert len(hops) == 3 and len(set(hops)) == 1
    side = LENGTH // 4
    flops = [2 * 2 * BATCH * 4 * WIDTH * n for n in ([side * (side + 1) / 2] if causal else []) + [side * side] * 4][:4]
    steps = [one / 1e9 for one in flops]
    beside = [max(c, hops[0]) + (1 - overlap) * min(c, hops[0]) for c in steps[:-1]]
    others = plan.compute - sum(steps)
    assert plan.predicted == pytest.approx(sum(beside) + steps[-1] + others, rel=1e-9)
    assert plan.hidden == pytest.approx(sum(steps) + 3 * hops[0] - sum(beside) - steps[-1], abs=1e-12)


def test_links_decide_which_variant_runs() -> None:
    """Fast links: heads are split, though all of q, k, v travel twice; slow ones with few heads of keys: a ring."""

    def strategy(there: Hardware, kv_heads: int, shared: int, causal: bool) -> str:
        with torch.no_grad():
            model = Sequences(kv_heads, shared, ("a",), causal)
            weights = {name: (*[None] * (p.dim() - 2), ("a",), None) for name, p in model.named_parameters()}
            plan = shardc.compile(model, "a=4", (), constraints=weights, hardware=there, outputs="sharded").plan
        answer = plan.why("getitem")
        assert all(one.extra >= 0 for one in answer.instead) and len(answer.instead) >= 3
        assert "  instead    a splits " in str(answer)
        return answer.strategy

    assert strategy(device(1.0, 1e6), 1, 6, False) == "a splits r and s together (ring)"
    assert strategy(device(0.0, 1e12), 8, 1, True) == "a splits h"
