"""A causal decoder whose sequence is folded: values, gradients, and outputs in the right order. For ranks.py."""

import copy
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from samples.causal_decoder import CausalDecoder
from shardc import shard
from shardc.runtime import local_mesh

mesh, batch = sys.argv[1:3]
torch.manual_seed(0)
single = CausalDecoder(batch, "cp~folded", logits=True).double()
model = shard(copy.deepcopy(single), mesh=mesh, hardware="cpu", outputs="sharded")
tokens = torch.randint(0, 24, (2, 480))


def same(given):
    single.zero_grad()
    model.zero_grad()
    (loss, logits), (expected, right) = model(given), single(tokens)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert isinstance(logits, DTensor), logits
    torch.testing.assert_close(logits.full_tensor(), right, rtol=1e-10, atol=1e-10)
    (loss + logits.square().mean()).backward()
    (expected + right.square().mean()).backward()
    for one, other in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=1e-10, atol=1e-10)


same(tokens)
assert "cp~folded" in model.code, model.code
axes = local_mesh({name: int(size) for name, _, size in (pair.partition("=") for pair in mesh.split(","))})
part = tokens.chunk(axes.axes["cp"], 1)[axes.coordinates(dist.get_rank())["cp"]]
same(DTensor.from_local(part, axes.device_mesh, [Shard(1) if axis == "cp" else Replicate() for axis in axes.axes]))
print("folded as on one device", flush=True)
dist.destroy_process_group()
