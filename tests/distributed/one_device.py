"""A model over gloo has the gradients, the types and the memory order of its results that one device gives."""

import copy
import sys

import torch
from torch import nn

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
print("as on one device")
