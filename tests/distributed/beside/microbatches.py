"""Micro-batches over gloo, with torch's own optimizer, beside one device. Run by torchrun with four processes."""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from shardc import accumulate, shard

dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
mesh, data = sys.argv[1:]
rank = dist.get_rank()


class Net(nn.Module):
    """A loss over the labels that count; with `more`, logits too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.drop, self.down = nn.Linear(12, 24), nn.Dropout(0.2), nn.Linear(24, 12)

    def forward(self, x, labels, more=False):
        logits = self.down(self.drop(torch.tanh(self.up(x))))
        loss = F.cross_entropy(logits, labels)
        return (loss, logits) if more else loss


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def batch():
    torch.manual_seed(5)
    labels = torch.randint(12, (16,))
    labels[3:7] = -100
    return torch.randn(16, 12), labels


def mine(tensor):
    """This rank's part, where every rank brings its own."""
    return tensor if data == "-" else tensor.chunk(2)[rank // 2]


def train(model, part, accumulating):
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    found = []
    for step in range(3):
        x, labels = map(part, batch())
        torch.manual_seed(step)
        optimizer.zero_grad()
        with accumulating(model) if step == 2 else torch.enable_grad():
            model(x + step, labels).backward()
            if step == 2:
                model(x, labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        found += [full(one.grad).clone() for one in model.parameters()]
    torch.manual_seed(9)
    loss, logits = model(x, labels, more=True)
    found += [full(loss).detach(), *map(full, model.parameters())]
    return found, full(logits).detach()


asked = {"up": ("dp", None), "up.weight": ("dp", None), "down.weight": (None, "tp")}
options = {} if data == "-" else {"data": data}
one, many = Net(), shard(Net(), mesh=mesh, microbatches=4, mode="propagate", constraints=asked, **options)
expected, logits = train(one, lambda tensor: tensor, lambda model: torch.enable_grad())
found, ours = train(many, mine, accumulate)
for place, pair in enumerate(zip(found, expected, strict=True)):
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-10, msg=lambda text, place=place: f"{place}: {text}")
torch.testing.assert_close(ours, mine(logits), rtol=1e-9, atol=1e-10)
assert "MICROBATCHES = 4" in many.code
print("micro-batches equal one device", flush=True)
dist.destroy_process_group()
