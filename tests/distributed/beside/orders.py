"""Random orders of what people do with a model and an optimizer, over gloo and on one device. For ranks.py.

orders.py 50      so many orders; each must give the same outputs, parameters and optimizer states
"""

import copy
import random
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from shardc import shard

OPTIMIZERS = {
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))


def batch(rows):
    torch.manual_seed(rows)
    return torch.randn(rows, 6)


class Life:
    """One model on its way through an order; `seen` is what must be the same on one device."""

    def __init__(self, prepare):
        self.model, self.optimizer, self.kind = prepare(net(0)), None, ""
        self.saved, self.seen, self.taken = None, [], self.model.state_dict()

    def make(self, draw):
        self.kind = draw.choice(sorted(OPTIMIZERS))
        self.optimizer = OPTIMIZERS[self.kind](self.model.parameters())

    def load(self, draw):
        assign = draw.random() < 0.3
        self.model.load_state_dict(net(draw.randrange(1, 5)).state_dict(), assign=assign)

    def evaluate(self, draw):
        with draw.choice((torch.no_grad, torch.inference_mode))():
            self.seen.append(self.model(batch(draw.choice((1, 4)))))

    def train(self, draw):
        self.model.zero_grad()
        self.model(batch(4)).square().mean().backward()
        if self.optimizer is not None:
            self.optimizer.step()

    def save(self, draw):
        states = self.model.state_dict(), self.optimizer and self.optimizer.state_dict()
        self.saved = (self.kind, *copy.deepcopy(states))

    def resume(self, draw):
        if self.saved is not None:
            kind, model, optimizer = copy.deepcopy(self.saved)
            self.model.load_state_dict(model)
            if optimizer is not None and kind == self.kind:
                self.optimizer.load_state_dict(optimizer)

    def replace(self, draw):
        at = draw.choice((0, 2))
        self.model[at] = net(draw.randrange(5, 9))[at]


def full(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def lived(prepare, seed):
    draw = random.Random(seed)
    life = Life(prepare)
    names = [draw.choice(("make", "load", "evaluate", "train", "train", "save", "resume", "replace")) for _ in range(7)]
    for name in names:
        getattr(life, name)(draw)
    life.train(draw)
    life.evaluate(draw)
    held = life.optimizer.state.values() if life.optimizer else ()
    states = [value for state in held for value in state.values() if isinstance(value, torch.Tensor)]
    taken = [] if {"load", "replace"} & {*names} else [*life.taken.values()]
    return names, [full(value).detach() for value in (*life.seen, *life.model.parameters(), *taken, *states)]


dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
mesh = f"tp={dist.get_world_size()}"
for seed in range(int(sys.argv[1])):
    names, alone = lived(lambda model: model, seed)
    split = {"0.weight": ("tp", None), "2.weight": (None, "tp")} if seed % 2 else {}
    _, many = lived(lambda model, split=split: shard(model, mesh=mesh, hardware="cpu", constraints=split), seed)
    assert len(alone) == len(many), (seed, names)
    for index, (one, other) in enumerate(zip(alone, many, strict=True)):
        said = f"order {seed}, {names}, {index}"
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-10, msg=lambda text, said=said: f"{said}: {text}")
print(f"{sys.argv[1]} orders equal one device", flush=True)
