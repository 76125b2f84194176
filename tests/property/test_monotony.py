"""Small random programs within one bound after the other: a larger bound never gives a slower plan."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc.errors import InfeasibleError

PARTS = (0.65, 0.8, 0.9, 1.0)


class Tower(nn.Module):
    """Blocks of random widths and kinds between residual sums."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self.width = random.choice((128, 256, 512))
        self.up, self.down, self.kinds = nn.ModuleList(), nn.ModuleList(), list[str]()
        for _ in range(random.randint(2, 3)):
            wide = random.choice((2, 4, 8)) * self.width
            self.up.append(nn.Linear(self.width, wide))
            self.down.append(nn.Linear(wide, self.width))
            self.kinds.append(random.choice(("gelu", "softmax", "norm")))

    def forward(self, x: Tensor) -> Tensor:
        for kind, up, down in zip(self.kinds, self.up, self.down, strict=True):
            wide = up(x)
            if kind == "norm":
                wide = nn.functional.layer_norm(wide, wide.shape[-1:])
            x = x + down(torch.softmax(wide, dim=-1) if kind == "softmax" else nn.functional.gelu(wide))
        return x


@pytest.mark.parametrize("seed", range(3))
def test_a_larger_bound_never_gives_a_slower_plan(seed: int) -> None:
    """By the objective. Every bound is planned for itself: none learns from another."""
    random = Random(seed)
    mesh = random.choice(("dp=2", "dp=4", "dp=2,tp=2"))
    with torch.device("meta"):
        model = Tower(random)
        batch = (torch.empty(random.choice((1024, 4096)), model.width),)
    optimizer = random.choice((None, "adamw"))
    free = shardc.compile(model, mesh, batch, memory="unbounded", hardware="h100", optimizer=optimizer).plan
    before = float("inf")
    for part in PARTS:
        try:
            bound = part * free.memory.peak
            plan = shardc.compile(model, mesh, batch, memory=bound, hardware="h100", optimizer=optimizer).plan
        except InfeasibleError:
            assert before == float("inf")  # what fits within a bound fits within a larger one
            continue
        assert plan.memory.peak <= bound
        assert free.cost * (1.0 - 1e-9) <= plan.cost <= before * (1.0 + 1e-9)
        before = plan.cost
    assert before == pytest.approx(free.cost, rel=1e-9)
