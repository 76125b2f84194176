"""Programs that run beside themselves: on one device, and sharded over gloo.

Each `Programs` is a list of functions. A function is called with `prepare`, which shards a model or leaves it alone.
It returns tensors that must be the same either way.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from shardc import shard


class Programs(list):
    """Decorates functions; `compare` runs those that the command line names, or all."""

    def __call__(self, function):
        self.append(function)
        return function

    def compare(self):
        """On two meshes of four ranks by turns; those that are named, on both."""
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float64)
        for turn, (mesh, axis) in enumerate((("dp=2,tp=2", "tp"), ("a=4", "a"))):
            for number, program in enumerate(self):
                if program.__name__ not in sys.argv[1:] if sys.argv[1:] else number % 2 != turn:
                    continue
                options = {"mesh": mesh, "hardware": "cpu", "constraints": {"0.weight": (axis, None)}}
                alone = program(lambda model: model)
                many = program(lambda model, options=options: shard(model, **options))
                assert len(alone) == len(many)
                for index, pair in enumerate(zip(alone, many, strict=True)):
                    same(*pair, f"{program.__name__} on {mesh}, result {index}")
        print(f"{len(self)} programs equal one device", flush=True)


def net(width=12, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 24), nn.Tanh(), nn.Linear(24, width))


def data(rows=8, width=12):
    torch.manual_seed(9)
    return torch.randn(rows, width)


def step(model, optimizer=None, x=None):
    if optimizer is not None:
        optimizer.zero_grad()
    loss = model(data() if x is None else x).square().mean()
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    return loss


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(one, other, what):
    other = full(other)
    atol = 1e-10 if one.dtype is torch.float64 else 1e-5
    torch.testing.assert_close(other.detach(), one.detach(), rtol=1e-4, atol=atol, msg=lambda text: f"{what}: {text}")
