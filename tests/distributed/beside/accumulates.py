"""Training loops that accumulate gradients over gloo, with torch's own optimizers, beside one device. Run by torchrun
with four processes."""

import torch
from beside.common import Programs, data, full, net
from torch import nn

import shardc

programs = Programs()


def loop(model, optimizer, accumulating, meanwhile=lambda model: None):
    """Two steps of three batches each; what the parameters are then, and the gradients."""
    for turn in range(2):
        optimizer.zero_grad()
        with accumulating(model):
            for part in range(3):
                (model(data() + turn - part).square().mean() / 3).backward()
                meanwhile(model)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    return [full(one) for one in model.parameters()] + [full(one.grad) for one in model.parameters()]


def block(model):
    """`accumulate` for a sharded model; nothing on one device."""
    return shardc.accumulate(model) if hasattr(model, "compiled_for_test") else torch.enable_grad()


def sharded(prepare):
    model = net()
    prepared = prepare(model)
    if "_shardc" in vars(prepared):
        prepared.compiled_for_test = True
    return prepared


@programs
def adamw(prepare):
    model = sharded(prepare)
    return loop(model, torch.optim.AdamW(model.parameters(), lr=0.1), block)


@programs
def reads_meanwhile(prepare):
    model = sharded(prepare)
    seen = []
    made = loop(
        model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), block,
        lambda model: seen.append(full(model[0].weight.grad).clone()),
    )  # fmt: skip
    return made + seen


programs.compare()
