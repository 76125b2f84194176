"""Rings of matrix products in whole plans: where the solver chooses them, and training with each of them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import shardc
from checks import forced
from checks.training import losses_of
from samples.causal_decoder import CausalDecoder
from shardc.cost.hardware import Hardware, hardware

H100 = hardware("h100")
SILENT = replace(H100, inside=replace(H100.inside, overlap=0.0), between=replace(H100.between, overlap=0.0))


class MLP(nn.Module):
    """Megatron's, between values whose sequence is split."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = shardc.constrain(x.sin(), (None, "tp", None))
        return shardc.constrain(self.down(torch.relu(self.up(x))), (None, "tp", None))


def planned(device: Hardware, width: int = 8192) -> shardc.Compiled:
    with torch.device("meta"), torch.no_grad():
        model, x = MLP(width, 4 * width).bfloat16(), torch.empty(1, width, width, dtype=torch.bfloat16)
        asked = {"up.weight": ("tp", None), "down.weight": (None, "tp")}
        return shardc.compile(model, "tp=8", (x,), constraints=asked, hardware=device, outputs="sharded")


@pytest.fixture(scope="module")
def chosen() -> shardc.Compiled:
    return planned(H100)


def test_a_ring_before_and_after_megatrons_mlp(chosen: shardc.Compiled) -> None:
    assert 'ring_lhs(sin.reshape(1024, 8192), up_weight.t(), m=Part(("tp",), 8192))' in chosen.code
    assert 'ring_sum(relu.reshape(8192, 4096), down_weight.t(), m=Part(("tp",), 8192))' in chosen.code
    assert {step.kind for step in chosen.plan.conversions} == {"permute"}


def test_the_plan_is_faster_than_without(chosen: shardc.Compiled) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hardware, "hiding", lambda *_: ())
        without = planned(H100)
    assert chosen.plan.predicted < 0.9 * without.plan.predicted
    assert chosen.plan.cost < without.plan.cost
    assert chosen.plan.memory.peak < without.plan.memory.peak


@pytest.mark.parametrize(("device", "width"), [(SILENT, 8192), (H100, 128), (hardware("cpu"), 8192)])
def test_no_ring_where_little_is_hidden(device: Hardware, width: int) -> None:
    assert "ring_" not in planned(device, width).code


def test_why_lists_what_else_could_run(chosen: shardc.Compiled) -> None:
    answer = chosen.plan.why("mm_1")
    assert answer.strategy == "tp splits k and m together (ring_sum)" and not answer.ways
    others = {one.strategy: one.extra for one in answer.instead}
    assert others["tp splits k"] > 0


@pytest.mark.parametrize(("variant", "mesh", "all_of_them"), [
    ("ring_lhs", "a=4", 17), ("ring_rhs", "a=2,b=2", 21), ("ring_sum", "a=3", 18),
])  # fmt: skip
def test_training_by_rings_alone(variant: str, mesh: str, all_of_them: int) -> None:
    """Of 21 products, some have a dim too small for the ranks."""
    torch.manual_seed(0)
    model = CausalDecoder(width=12, layers=1).double()
    single, tokens = copy.deepcopy(model), torch.randint(0, 24, (4, 8))
    with forced.products(variant):
        compiled = shardc.compile(model, mesh, (tokens,), outputs="full")
    assert compiled.code.count(f" {variant}(") == all_of_them
    inputs = {"tokens": tokens}
    trained = losses_of(compiled, inputs, torch.optim.SGD(model.parameters(), 0.1))
    right = losses_of(single, inputs, torch.optim.SGD(single.parameters(), 0.1))
    assert trained == pytest.approx(right, rel=1e-10)
    for one, other in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    sent = {axis: moved / 3 for axis, moved in compiled.executable.mesh.traffic.items()}
    assert compiled.plan.bytes_per_axis == pytest.approx(sent, rel=1e-12)
