"""What becomes of parameters over gloo, beside the same program on one device. Run by torchrun.

Each function is one life: it is called with `prepare`, which shards a model or leaves it alone, and returns tensors
that must be the same either way."""

import copy
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

import shardc
from shardc import shard

LIVES = []


def life(function):
    LIVES.append(function)
    return function


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
def written_in_place(prepare):
    model = prepare(net())
    step(model)
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(24, 12))
        model[0].bias.fill_(0.5)
        model[2].weight.mul_(2).add_(torch.ones(12, 24))
        model[2].bias += torch.arange(12.0)
        nn.init.constant_(model[2].weight, 0.1)
        nn.init.zeros_(model[0].bias)
    model[0].bias.data = torch.ones(24)
    model[0].weight.data.clamp_(max=0.5)
    model[2].weight.grad = torch.ones(12, 24)
    grad = model[2].weight.grad
    model[2].weight.grad = None
    step(model)
    return grad, *model.parameters(), *(p.grad for p in model.parameters())


@life
def a_submodule_by_itself(prepare):
    model = prepare(net())
    step(model)
    before = nn.Linear(12, 12)
    out = model[0](before(data()))
    F.mse_loss(out, torch.ones(8, 24)).backward()
    return out, model[0].weight.grad, before.weight.grad, F.linear(data(), model[0].weight)


@life
def a_penalty_and_a_plain_head(prepare):
    model = prepare(net())
    torch.manual_seed(3)
    head = nn.Linear(12, 3)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=0.1)
    norms = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(head(model(data())), torch.arange(8) % 3)
        loss = loss + 0.1 * sum(p.square().sum() for p in model.parameters()) + 0.1 * head.weight.abs().sum()
        loss = loss + 0.01 * (model[0].weight.norm() * head.weight.norm())
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], 0.5))
        optimizer.step()
    nn.utils.clip_grad_value_([*model.parameters(), *head.parameters()], 0.01)
    return *norms, *model.parameters(), *head.parameters(), head.weight.grad, model[0].weight.grad


@life
def plain_before_and_between(prepare):
    torch.manual_seed(0)
    before, between = nn.Embedding(50, 12), nn.LayerNorm(12)
    one, two = prepare(net()), prepare(net(seed=1))
    ids = torch.arange(8)
    loss = two(between(one(before(ids)))).square().mean()
    loss.backward()
    return loss, before.weight.grad, between.weight.grad, *(p.grad for p in (*one.parameters(), *two.parameters()))


@life
def copies(prepare):
    model = prepare(net())
    fresh = copy.deepcopy(model)
    step(model)
    copied = copy.deepcopy(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    for each in (fresh, copied):
        step(each, torch.optim.SGD(each.parameters(), lr=0.1))
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    average.update_parameters(model)
    average.update_parameters(copied)
    with torch.no_grad():
        averaged = average(data())
    grads = [p.grad for p in copied.parameters()]
    return (
        averaged,
        *grads,
        *model.parameters(),
        *copied.parameters(),
        *fresh.parameters(),
        *average.module.parameters(),
    )


@life
def accumulated_and_of_second_use(prepare):
    model = prepare(net())
    for rows in (8, 4):
        step(model, x=data(rows))
    first = torch.autograd.grad(model(data()).mean(), list(model.parameters()))
    (model(data()).mean() + model[0](data()).mean()).backward()
    return *first, *(p.grad for p in model.parameters())


@life
def batch_norm_and_buffers(prepare):
    torch.manual_seed(0)
    model = prepare(nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Linear(24, 12)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        step(model, optimizer)
    model.eval()
    with torch.no_grad():
        return model(data()), *model.buffers(), *model.parameters()


@life
def converted(prepare):
    model = prepare(net())
    with torch.no_grad():
        model(data())
    model.float()
    step(model, x=data().float())
    model.double().to("cpu")
    model.zero_grad()
    step(model)
    return tuple(p.grad for p in model.parameters())


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


@life
def vectors_of_parameters(prepare):
    model = prepare(net())
    step(model)
    vector = nn.utils.parameters_to_vector(
        [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    )
    total = sum((p.grad * p).sum() for p in model.parameters())
    added = torch.zeros(())
    for parameter in model.parameters():
        added += parameter.detach().square().sum()
    stacked = torch.stack([p.norm() for p in model.parameters()])
    return vector, total, added, stacked, torch.cat([model[0].bias, torch.ones(3)])


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(one, other, what):
    other = full(other)
    atol = 1e-10 if one.dtype is torch.float64 else 1e-5
    torch.testing.assert_close(other.detach(), one.detach(), rtol=1e-4, atol=atol, msg=lambda text: f"{what}: {text}")


dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
for mesh, axis in (("dp=2,tp=2", "tp"), ("a=4", "a")):
    for one in LIVES:
        if sys.argv[1:] and one.__name__ not in sys.argv[1:]:
            continue
        split = {"0.weight": (axis, None)}
        alone = one(lambda model: model)
        many = one(lambda model, mesh=mesh, split=split: shard(model, mesh=mesh, hardware="cpu", constraints=split))
        assert len(alone) == len(many)
        for index, pair in enumerate(zip(alone, many, strict=True)):
            same(*pair, f"{one.__name__} on {mesh}, result {index}")
print(f"{len(LIVES)} lives equal one device", flush=True)
