"""What becomes of parameters, beside the same program on one device. For ranks.py."""

import copy

import torch
from beside.common import Programs, data, net, step
from torch import nn
from torch.distributed.tensor import DTensor

import shardc
from shardc import shard

life = Programs()


@life
def evaluated_in_inference_mode_first(prepare):
    model = prepare(net())
    with torch.inference_mode():
        before = model(data())
    step(model)
    with torch.no_grad():
        return before, model(data()), model[0].weight.grad


@life
def evaluated_between(prepare):
    """A program that evaluates was planned before training moved the parameters, and another after."""
    model = prepare(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    seen = []
    for rows in (8, 1, 8, 3, 8):
        with torch.no_grad():
            seen.append(model(data(rows)))
        step(model, optimizer)
    return *seen, *model.parameters()


@life
def hooks_of_either_kind_before_and_after(prepare):
    model, counts = net(), torch.zeros(3)

    def counted(index):
        def count(_):
            counts[index] += 1

        return count

    for parameter in model.parameters():
        parameter.register_hook(counted(0))
        parameter.register_post_accumulate_grad_hook(counted(1))
    model = prepare(model)
    for parameter in model.parameters():
        parameter.register_hook(counted(2))
    step(model)
    return (counts,)


@life
def a_loss_that_is_scaled(prepare):
    """An infinity in one element, and so on one rank, skips the step on all, and the scale falls on all."""
    model = prepare(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    seen = []
    for number in range(6):
        optimizer.zero_grad()
        scaler.scale(model(data()).square().mean()).backward()
        if number in (2, 4):
            gradient = model[0].weight.grad
            if not isinstance(gradient, DTensor):
                gradient[0, 0] = float("inf")
            elif not gradient.device_mesh.get_coordinate()[-1]:  # the ranks that hold the first rows
                gradient.to_local()[0, 0] = float("inf")
        if number % 2 == 0:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        seen.append(torch.tensor(scaler.get_scale()))
    return *seen, *model.parameters()


@life
def scaled_by_a_hook(prepare):
    model = prepare(net())
    model[0].weight.register_hook(lambda grad: 3 * grad)
    step(model)
    return (model[0].weight.grad,)


@life
def optimizer_made_and_stepped_before(prepare):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    model = prepare(model)
    step(model, optimizer)
    return tuple(model.parameters())


@life
def optimizer_made_by_someone_with_other_groups(prepare):
    model = prepare(net())
    groups = [{"params": [model[0].weight], "lr": 0.1}, {"params": {2: model[2].weight}.values(), "lr": 0.01}]
    optimizer = torch.optim.SGD([{**group, "params": list(group["params"])} for group in groups], momentum=0.9)
    for _ in range(3):
        step(model, optimizer)
    return tuple(model.parameters())


@life
def adagrad_rmsprop_and_scheduler(prepare):
    model = prepare(net())
    first = torch.optim.Adagrad([model[0].weight], lr=0.1)
    second = torch.optim.RMSprop([model[2].weight], lr=0.1, momentum=0.5, centered=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(first, 0.5)
    for _ in range(3):
        first.zero_grad()
        step(model, second)
        first.step()
        schedule.step()
    return tuple(model.parameters())


@life
def resumed_from_one_device(prepare):
    old = net()
    optimizer = torch.optim.AdamW(old.parameters(), lr=0.1)
    step(old, optimizer)
    model = prepare(net(seed=5))
    model.load_state_dict(copy.deepcopy(old.state_dict()))
    again = torch.optim.AdamW(model.parameters(), lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, again)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, again)
    return tuple(model.parameters())


@life
def what_was_taken_before_the_first_call(prepare):
    model = prepare(net())
    early = (
        tuple(model.parameters()),
        set(model.parameters()),
        model.state_dict(),
        [p.detach() for p in model.parameters()],
    )
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert early[1] == set(model.parameters())
    norm = nn.utils.clip_grad_norm_(early[0], 1e-3)
    return norm, *early[0], *early[2].values(), *early[3]


@life
def replaced_frozen_and_thawed(prepare):
    model = prepare(net())
    step(model)
    torch.manual_seed(1)
    model[2] = nn.Linear(24, 12)
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    model[0].requires_grad_(True)
    model[0].bias = nn.Parameter(torch.ones(24))
    step(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    model[2].bias = None
    step(model)
    return *model.parameters(), *(p.grad for p in model.parameters())


@life
def tied_after_the_first_call(prepare):
    model = prepare(net())
    step(model)
    model[2].weight = nn.Parameter(torch.ones(12, 24))
    model.append(nn.Linear(12, 24, bias=False))
    model[3].weight = nn.Parameter(torch.ones(24, 12))
    step(model)
    model.append(nn.Linear(24, 24))
    model.append(nn.Linear(24, 24))
    model[5].weight = model[4].weight
    step(model)
    assert model[5].weight is model[4].weight
    return tuple(p.grad for p in model.parameters())


@life
def loaded_after_the_first_call(prepare):
    seen = []
    for assign in (False, True):
        model, other = prepare(net()), net(seed=3)
        step(model)
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        model[0].load_state_dict(copy.deepcopy(other[0].state_dict()), assign=assign)
        seen += [model(data()), *model.parameters()]
    return tuple(seen)


@life
def a_decorated_class(prepare):
    """Its parameters are plain when it is made: an optimizer made then gets the DTensors later."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    made = Net if prepare(nn.Identity()).__class__ is nn.Identity else shard(Net, mesh="a=4", hardware="cpu")
    model = made()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    for _ in range(2):
        step(model, optimizer)
    return tuple(model.parameters())


@life
def compiled_for_both(prepare):
    """Ahead of time, for training and for evaluation, before the parameters lie anywhere."""
    model = net()
    if isinstance(prepare(net())[0].weight, DTensor):
        train = shardc.compile(model, "a=4", (data(),), hardware="cpu")
        with torch.no_grad():
            evaluate = shardc.compile(model, "a=4", (data(),), hardware="cpu")
    else:
        train = evaluate = model
    with torch.no_grad():
        before = evaluate(data())
    step(train)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        return before, evaluate(data()), *model.parameters()


life.compare()
