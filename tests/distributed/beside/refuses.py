"""What is refused over gloo, and what `distribute` does by hand. Run by torchrun."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import shardc
from shardc import ShardcError, shard

dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(dist.get_rank())

model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
held = tuple(model.parameters())
with pytest.raises(ShardcError, match=r"a tuple holds the parameter 0\.weight"):
    shard(model, mesh="a=4")
del held
with pytest.raises(ShardcError, match="larger than the 4 processes"):
    shard(nn.Linear(8, 8), mesh="a=8")
with pytest.raises(ShardcError, match="no mesh"):
    shardc.distribute(model)

with torch.device("meta"):
    big = nn.Sequential(nn.Linear(8, 8))
planned = shardc.compile(big, "a=4", (torch.empty(4, 8),))
assert planned.plan.cost > 0
with pytest.raises(ShardcError, match="on the meta device"):
    planned(torch.ones(4, 8))
with pytest.raises(ShardcError, match="on the meta device"):
    shard(big, mesh="a=4")(torch.ones(4, 8))
with pytest.raises(ShardcError, match="on the meta device"):
    shardc.distribute(big)
big.to_empty(device="cpu")
torch.manual_seed(dist.get_rank())
for parameter in big.parameters():
    nn.init.normal_(parameter)
shardc.distribute(big)
weights = [torch.empty(8, 8) for _ in range(4)]
dist.all_gather(weights, big[0].weight.full_tensor().detach())
assert all(torch.equal(weight, weights[0]) for weight in weights)
big(torch.ones(4, 8)).sum().backward()

assert shardc.distribute(model, mesh="a=4") is model and all(isinstance(p, DTensor) for p in model.parameters())
assert model._is_accelerate_prepared  # so that Accelerate does not wrap it
lazy = shard(nn.Sequential(nn.LazyLinear(8)), mesh="a=4")
assert not isinstance(lazy[0].weight, DTensor)

trained = shard(nn.Linear(8, 8), mesh="a=4")
optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)


def fails():
    raise ValueError("inside of a step")


with pytest.raises(ValueError, match="inside"):
    optimizer.step(fails)
trained(torch.ones(4, 8)).sum().backward()
assert trained.weight.norm() + torch.ones(()) > 0 and (trained.weight + torch.ones(8, 8)).shape == (8, 8)
print(f"refused as it should be by {sys.executable}", flush=True)
