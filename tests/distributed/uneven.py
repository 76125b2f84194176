"""Trains a decoder whose dims the mesh does not divide over gloo, beside single device. Run by ranks.py."""

import copy
import sys

import torch
from torch.distributed.tensor import DTensor

from samples.odd_sizes import DIVIDES, Decoder
from shardc import shard

torch.manual_seed(0)
words, labels = torch.randint(0, 57, (7, 9)), torch.randint(0, 57, (7, 9))
single = Decoder().double()
wanted = {"embed.weight": ("tp", None), "up.weight": ("tp", None), "head.weight": ("tp", None), "norm.weight": ("tp",)}
model = shard(copy.deepcopy(single), mesh=sys.argv[1], hardware=DIVIDES, constraints=wanted)
ours, theirs = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, single))
for _ in range(3):
    losses = []
    for each, optimizer in ((model, ours), (single, theirs)):
        optimizer.zero_grad()
        losses.append(each(words, labels))
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(each.parameters(), 1.0)
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    for (name, one), other in zip(model.named_parameters(), single.parameters(), strict=True):
        assert isinstance(one, DTensor)
        torch.testing.assert_close(one.grad.full_tensor(), other.grad, rtol=1e-10, atol=1e-12, msg=name)
    ours.step()
    theirs.step()
weight = model.embed.weight
rows = [weight.to_local().shape[0]]
gathered = [None] * torch.distributed.get_world_size()
torch.distributed.all_gather_object(gathered, rows[0])
assert len(set(gathered)) > 1, "the vocabulary of 57 is stored unevenly"
torch.testing.assert_close(weight.full_tensor(), single.embed.weight, rtol=1e-9, atol=1e-12)
print("odd sizes equal single device")
