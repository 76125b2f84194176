"""Ranks that found different plans run that of rank 0 (for ranks.py)."""

import copy
import os

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from shardc import shard
from shardc.passes import capture

torch.manual_seed(0)
single, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).double(), torch.randn(4, 8).double()

if os.environ["RANK"] == "1":  # as if its search had found another plan
    demanded = capture.parameter_demands
    capture.parameter_demands = lambda program, model, _, mesh: demanded(
        program, model, {"0.weight": (None, "tp")}, mesh
    )
model = shard(copy.deepcopy(single), mesh="tp=2", hardware="cpu", constraints={"0.weight": ("tp", None)})
for each in (model, single):
    each(x).square().mean().backward()
torch.testing.assert_close(model(x), single(x), rtol=1e-10, atol=0)
for one, other in zip(model.parameters(), single.parameters(), strict=True):
    torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=1e-10, atol=1e-14)
weight = next(model.parameters())
assert isinstance(weight, DTensor) and weight.placements == (Shard(0),), weight
print("rank 0's plan runs")
