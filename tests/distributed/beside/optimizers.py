"""torch's optimizers, clipping, schedulers, averages and adapters over gloo, beside one device. Run by torchrun with
four processes."""

import itertools
import math

import torch
from beside.common import Programs, data, full, net
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

programs = Programs()


class Whitened(torch.optim.Optimizer):
    """Looks at whole matrices, as Muon and Shampoo do: with products, plain tensors as state, and values read."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                update, state = parameter.grad, self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(update)).lerp_(update, 0.1)
                if update.ndim == 2:
                    square = state.setdefault("square", torch.eye(len(update)))
                    square += update @ update.T
                    values, vectors = torch.linalg.eigh(square)
                    update = vectors @ torch.diag(values.rsqrt()) @ vectors.T @ update.add(average)
                    update /= update.norm() + 1e-7
                parameter.add_(update, alpha=-group["lr"] * min(1.0, parameter.norm().item()))


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "adafactor of lists": lambda p: torch.optim.Adafactor(p, lr=0.1, foreach=True),
    "by hand": lambda p: Whitened(p, {"lr": 0.1}),
    "subclass": lambda p: type("Own", (torch.optim.AdamW,), {})(p, lr=0.1),
}


def state_of(optimizer):
    return [full(v).double() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]


def train(model, optimizer, steps=2, **clip):
    for _ in range(steps):
        optimizer.zero_grad()
        model(data()).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), **clip)
        optimizer.step()


@programs
def every_optimizer(prepare):
    model, made = prepare(net()), []
    for build in OPTIMIZERS.values():
        optimizer = build(model.parameters())
        train(model, optimizer)
        saved = optimizer.state_dict()  # what was made on local tensors is a DTensor, and goes on where it was
        kept = [
            v for s in saved["state"].values() for k, v in s.items() if torch.is_tensor(v) and v.dim() and k != "square"
        ]
        assert all(isinstance(v, DTensor) == ("_shardc" in vars(model)) for v in kept)
        other = build(model.parameters())
        other.load_state_dict(saved)
        train(model, other, steps=1)
        made += [*(full(one).detach().clone() for one in model.parameters()), *state_of(other)]
    return made


@programs
def clipping(prepare):
    """Parameters that are split evenly and not, and whole ones; every norm, in both of torch's ways."""
    model, made = prepare(net(width=13)), []
    for norm, foreach in itertools.product((1.0, 2.0, 3.0, math.inf), (False, True)):
        model.zero_grad()
        model(data(width=13)).square().mean().backward()
        total = nn.utils.clip_grad_norm_(model.parameters(), 0.05, norm_type=norm, foreach=foreach)
        made += [full(total), *(full(one.grad).clone() for one in model.parameters())]
    made.append(full(nn.utils.get_total_norm([one.grad for one in model.parameters()])))
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    return [*made, *(full(one.grad) for one in model.parameters())]


@programs
def groups_schedulers_and_averages(prepare):
    model = prepare(net())
    model[0].bias.requires_grad_(False)
    groups = [{"params": model[0].parameters(), "lr": 0.05}, {"params": model[2].parameters(), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=5)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        train(model, optimizer, steps=1, max_norm=0.5)
        scheduler.step()
        average.update_parameters(model)
    return [*map(full, model.parameters()), *map(full, average.module.parameters())]


class Adapted(nn.Module):
    """A layer that stays as it is, with a product of small matrices beside it, as LoRA has it."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) * 0.1)
        self.b = nn.Parameter(torch.randn(layer.out_features, rank) * 0.1)

    def forward(self, x):
        return self.layer(x) + x @ self.a.T @ self.b.T


@programs
def adapters(prepare):
    model = net()
    model[0], model[2] = Adapted(model[0]), Adapted(model[2])
    model = prepare(nn.Sequential(nn.Linear(12, 12), *model))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.1)
    train(model, optimizer, max_norm=1.0)
    return list(map(full, model.parameters()))


@programs
def a_step_with_a_closure(prepare):
    model = prepare(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def closure():
        optimizer.zero_grad()
        loss = model(data()).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    train(model, optimizer)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe")
    return [optimizer.step(closure), *map(full, model.parameters())]


programs.compare()
