"""Ranks that found different plans run that of rank 0 (for ranks.py)."""

import copy
import os

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from shardc import shard
from shardc.runtime import RankError

torch.manual_seed(0)
single, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).double(), torch.randn(4, 8).double()
wanted = ("tp", None) if os.environ["RANK"] == "0" else (None, "tp")
model = shard(copy.deepcopy(single), mesh="tp=2", hardware="cpu", constraints={"0.weight": wanted})
for each in (model, single):
    each(x).square().mean().backward()
torch.testing.assert_close(model(x), single(x), rtol=1e-10, atol=0)
for one, other in zip(model.parameters(), single.parameters(), strict=True):
    torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=1e-10, atol=1e-14)
weight = next(model.parameters())
assert isinstance(weight, DTensor) and weight.placements == (Shard(0),), weight
print("rank 0's plan runs")

other = shard(nn.Linear(8, 8 if os.environ["RANK"] == "0" else 12), mesh="tp=2", hardware="cpu")
try:
    other(torch.randn(4, 8))
    assert os.environ["RANK"] == "0", "this rank's program is not rank 0's"
except RankError as error:
    assert os.environ["RANK"] == "1" and "rank 0 runs another program here than this rank" in str(error), error
    assert "parameter weight [8, 8]" in str(error) and "parameter weight [12, 8]" in str(error), error
