"""Models with experts: every variant trains like the single device, and the plan says what is sent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from checks import forced
from checks.training import losses_of
from shardc.errors import ShardcError
from shardc.options import Options
from zoo.text import TEXT


def trained(model: nn.Module, call: Callable[..., Tensor], inputs: dict[str, Tensor]) -> list[float]:
    return losses_of(call, inputs, torch.optim.SGD(model.parameters(), 0.1))


@pytest.mark.parametrize("variant", forced.EXPERT_CALLS)
@pytest.mark.parametrize(("name", "mesh"), [("mixtral", "ep=3"), ("gpt_oss", "dp=2,ep=2"), ("qwen2_moe", "ep=2")])
def test_every_variant_trains_like_the_single_device(name: str, mesh: str, variant: str) -> None:
    torch.manual_seed(0)
    model, inputs = TEXT[name].build()
    alone = copy.deepcopy(model)
    with forced.experts(variant):
        compiled = shardc.compile(model, mesh, inputs, hardware="h100", memory="unbounded")
    assert forced.EXPERT_CALLS[variant] in compiled.code
    losses, right = trained(model, compiled, inputs), trained(alone, alone, inputs)
    tolerance = TEXT[name].tolerance
    torch.testing.assert_close(losses, right, rtol=tolerance, atol=tolerance)
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=tolerance, atol=tolerance)


class Layer(nn.Module):
    """Experts of which every token takes all, so that every exchange is balanced."""

    def __init__(self, k: int = 4) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        torch.manual_seed(0)
        config = MixtralConfig(hidden_size=16, intermediate_size=32, num_local_experts=4)
        self.experts = MixtralExperts(config).double()
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.k = k

    def forward(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        return self.experts(x, ids, scores).sum()


def routed(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, scores = torch.randn(len(ids), 16, dtype=torch.float64), torch.rand(ids.shape, dtype=torch.float64)
    return x.requires_grad_(), ids, scores.requires_grad_()


EVERY = torch.arange(4).repeat(12, 1)


def test_bytes_are_those_of_the_plan_where_routing_is_balanced() -> None:
    inputs = routed(EVERY)
    with forced.experts("exchanged"):
        compiled = shardc.compile(Layer(), "ep=2", inputs, hardware="h100", memory="unbounded")
    compiled.executable.mesh.reset()
    compiled(*inputs).backward()
    assert compiled.executable.mesh.traffic == pytest.approx(compiled.plan.bytes_per_axis)
    assert "all_to_all_rows" in str(compiled.plan)


def test_imbalance_makes_split_experts_dearer() -> None:
    def cost(**asked: Any) -> float:
        with forced.experts("exchanged"):
            compiled = shardc.compile(Layer(), "ep=2", routed(EVERY), hardware="h100", memory="unbounded", **asked)
        return compiled.plan.cost

    assert cost(imbalance=2.0) > cost()


def test_capacity_bounds_memory_and_overflow_is_as_asked() -> None:
    """All tokens go to one expert, which is on the first of two ranks: it gets twice the mean."""
    inputs = routed(torch.zeros(12, 1, dtype=torch.int64))
    right = float(Layer()(*inputs).detach())

    def asked(**options: Any) -> tuple[float, float]:
        with forced.experts("exchanged"):
            compiled = shardc.compile(Layer(), "ep=2", inputs, hardware="h100", memory="unbounded", **options)
        return float(compiled(*inputs).detach()), compiled.plan.memory.peak

    (roomy, most), (narrow, least) = asked(capacity=2.0), asked(capacity=1.0)
    assert roomy == pytest.approx(right) and narrow == pytest.approx(right)
    assert least < most
    assert asked(capacity=1.0, overflow="drop")[0] != pytest.approx(right)
    with pytest.raises(ShardcError, match="room for 6"):
        asked(capacity=1.0, overflow="error")


def test_what_makes_no_sense_is_refused() -> None:
    for asked in ({"capacity": 0.0}, {"imbalance": 0.5}):
        with pytest.raises(ShardcError, match="multiples of the mean"):
            Options(**asked)  # type: ignore[arg-type]
