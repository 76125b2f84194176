"""A model over gloo has the gradients, the types and the memory order of its results that one device gives; in mixed
precision, the losses of FSDP2 with the same types; and compiled, what it has as it is written."""

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from shardc import shard


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x):
        hidden = self.body(x)
        with torch.autocast("cpu", enabled=False):
            hidden = torch.tanh(hidden.float())
            a = self.a(hidden)
        return a, self.b(hidden), hidden.mT, hidden.unflatten(1, (4, 4)).mT.contiguous()


torch.manual_seed(0)
single = Heads()
model = shard(copy.deepcopy(single), mesh=sys.argv[1], hardware="cpu")
results = []
for each in (single, model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = each(torch.arange(64.0).view(8, 8) / 64)
    outputs[0].square().sum().backward()
    results.append(outputs)
for one, other in zip(*results, strict=True):
    torch.testing.assert_close(other.detach(), one.detach(), rtol=2e-2, atol=2e-2)
    assert other.stride() == one.stride(), (other.stride(), one.stride())
for (name, one), other in zip(single.named_parameters(), model.parameters(), strict=True):
    assert (one.grad is None) == (other.grad is None), name
    if one.grad is not None:
        torch.testing.assert_close(other.grad.full_tensor(), one.grad, rtol=2e-2, atol=2e-2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def losses(model):
    """The losses of twenty steps, over the batch of all ranks."""
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for batch in torch.randn(20, 8, 16, generator=torch.Generator().manual_seed(1)):
        part = batch.chunk(dist.get_world_size())[dist.get_rank()]
        loss = (model(part).float() - part.flip(-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.full_tensor() if isinstance(loss, DTensor) else loss)
    total = torch.stack([loss.detach() for loss in seen])
    dist.all_reduce(total)
    return total / dist.get_world_size()


def beside_fsdp(types):
    single = nn.Sequential(Block(), Block())
    theirs, fsdp_mesh = copy.deepcopy(single), init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*theirs, theirs):
        fully_shard(part, mesh=fsdp_mesh, mp_policy=MixedPrecisionPolicy(**types))
    ours = shard(single, mesh=sys.argv[1], hardware="cpu", data="dp", **types)
    expected, found = losses(theirs), losses(ours)
    assert expected[-3:].mean() < 0.9 * expected[:3].mean()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def compiled_functions():
    """Collectives are operators of the graphs that Inductor gets. Here these run as they were traced: compiling them
    would take a minute."""
    torch._inductor.compile = lambda graph, given: graph
    single = nn.Sequential(Block(), Block())
    demanded = {"*.up.weight": ("dp", None), "*.up": ("dp", None), "*.down": ("dp", None)}
    demanded |= {"*.down.weight": (None, None)}  # whose gradients go through buckets, which are reduced in place
    results = []
    for how in ("none", "inductor"):
        model = shard(copy.deepcopy(single), mesh=sys.argv[1], hardware="h100", compile=how, constraints=demanded)
        for _ in range(2):
            out = model(torch.arange(128.0).view(8, 16) / 64)
            out.square().sum().backward()
        results.append([out, *(parameter.grad.full_tensor() for parameter in model.parameters())])
    torch.testing.assert_close(*results)
    made = model.compiled.executable.module.COMPILED
    assert {name: (one.programs, one.reason) for name, one in made.items()} == dict.fromkeys(made, (1, "")), made
    assert all(name in model.code for name in ("all_gather", "reduce_scatter", "all_reduce_bucket")), model.code


compiled_functions()
beside_fsdp({"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "output_dtype": torch.float32})
print("as on one device")
