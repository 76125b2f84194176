"""Rank 0 plans, or reads the plan that a file has, and the others receive it (for ranks.py)."""

import copy
import os
import sys

import torch
from torch import nn

import shardc
from shardc import ShardcError, shard
from shardc.passes import assign

rank, path = int(os.environ["RANK"]), sys.argv[1]


def never(*_: object, **__: object) -> None:
    raise AssertionError(f"rank {rank} solves")


if rank:
    assign.solve = never
torch.manual_seed(0)
single, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).double(), torch.randn(4, 8).double()


def trained(**options: object) -> nn.Module:
    """The model, sharded, after a step like that of one device."""
    model = shard(copy.deepcopy(single), **options)
    one = copy.deepcopy(single)
    for each in (model, one):
        each(x).square().mean().backward()
    for mine, other in zip(model.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), other.grad, rtol=1e-10, atol=1e-14)
    return model


model = trained(mesh="tp=2", hardware="cpu", constraints={"0.weight": ("tp", None)})
if not rank:
    model.plan.save(path)
torch.distributed.barrier()
assign.solve = never
again = trained(plan=path)
assert again.code == model.code and str(again.plan).splitlines()[:3] == str(model.plan).splitlines()[:3]

if not rank:
    from shardc.solver.solve import solve

    assign.solve = solve
try:
    shardc.compile(copy.deepcopy(single), "tp=2", (x,), memory="1KB")
except ShardcError as error:
    print("refused:", str(error).splitlines()[0][:60])
