"""DTensors and plain tensors in one program, beside the same on one device. For ranks.py."""

import copy
import io

import torch
import torch.nn.functional as F
from beside.common import Programs, data, net, step
from torch import nn
from torch.distributed.tensor import DTensor

mix = Programs()


@mix
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


@mix
def a_submodule_by_itself(prepare):
    model = prepare(net())
    step(model)
    before = nn.Linear(12, 12)
    out = model[0](before(data()))
    F.mse_loss(out, torch.ones(8, 24)).backward()
    return out, model[0].weight.grad, before.weight.grad, F.linear(data(), model[0].weight)


@mix
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


@mix
def plain_before_and_between(prepare):
    torch.manual_seed(0)
    before, between = nn.Embedding(50, 12), nn.LayerNorm(12)
    one, two = prepare(net()), prepare(net(seed=1))
    ids = torch.arange(8)
    loss = two(between(one(before(ids)))).square().mean()
    loss.backward()
    return loss, before.weight.grad, between.weight.grad, *(p.grad for p in (*one.parameters(), *two.parameters()))


@mix
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


@mix
def accumulated_and_of_second_use(prepare):
    model = prepare(net())
    for rows in (8, 4):
        step(model, x=data(rows))
    first = torch.autograd.grad(model(data()).mean(), list(model.parameters()))
    (model(data()).mean() + model[0](data()).mean()).backward()
    return *first, *(p.grad for p in model.parameters())


@mix
def batch_norm_and_buffers(prepare):
    torch.manual_seed(0)
    model = prepare(nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Linear(24, 12)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        step(model, optimizer)
    model.eval()
    with torch.no_grad():
        return model(data()), *model.buffers(), *model.parameters()


@mix
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


@mix
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


READ = {
    "item": lambda t: t.norm().item(),
    "float": lambda t: float(t.sum()),
    "bool": lambda t: bool((t > 0.3).sum() > 9),
    "int": lambda t: int(100 * t.square().sum()),
    "format": lambda t: float(f"{t.norm():.9f}"),
    "percent": lambda t: float("%.9f" % t.norm()),  # noqa: UP031  (as loggers do it)
    "list": lambda t: sum(t.flatten().tolist()),
    "array": lambda t: t.detach().numpy().sum(),
    "contains": lambda t: t.abs().max() in t.abs(),
    "norms of rows": lambda t: t.norm(dim=1).sum(),
    "rows": lambda t: sum(row.norm() for row in t),
    "mask": lambda t: t[t > 0].sum(),
    "element": lambda t: t.flatten()[7],
    "view": lambda t: t.reshape(2, -1)[1].norm(),
    "close": lambda t: torch.allclose(t, t),
    "foreach": lambda t: torch._foreach_norm([t])[0].item(),
    "written": lambda t: t.norm(dim=0).square_().sum(),
}


@mix
def values_of_parts(prepare):
    """What users make of parameters and gradients of which each rank has a part, read by one rank alone or by all."""
    model = prepare(net())
    step(model)
    found = [read(one) for read in READ.values() for one in (model[0].weight, model[2].weight.grad)]
    norms = torch._foreach_norm([one.grad for one in model.parameters()])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    if not torch.distributed.get_rank():  # no other rank is needed for them
        assert float(f"{norm:.4f}") > max(one.item() for one in norms) > 0.05
    with torch.no_grad():
        model[0].weight.fill_diagonal_(0.5)
        model[2].weight.grad.cumsum_(0)
    return *(torch.as_tensor(one).double() for one in found), norm, *norms, *model.parameters(), model[2].weight.grad


WRITTEN = {
    "a row": lambda t, other: t[3].zero_(),
    "a row of a plain one": lambda t, other: t[-1].copy_(torch.ones(t.shape[1])),
    "an element": lambda t, other: t.__setitem__((5, 7), 9.0),
    "a row by index": lambda t, other: t.__setitem__(4, other[0]),
    "masked": lambda t, other: t.__setitem__(t > 0.1, 0.0),
    "the diagonal": lambda t, other: t.diagonal().mul_(2),
    "rows in a list": lambda t, other: torch._foreach_mul_([t[0], t[-1]], 3.0),
    "added rows": lambda t, other: t.index_add_(0, torch.tensor([0, 9]), other[:2]),
    "scattered": lambda t, other: t.scatter_add_(0, torch.zeros(t.shape, dtype=torch.long), other),
    "initialised": lambda t, other: nn.init.constant_(t[2], 0.25),
    "out": lambda t, other: torch.mul(other, torch.ones(t.shape[1]), out=t),
    "renormed": lambda t, other: F.embedding(torch.tensor([1, 4]), t, max_norm=0.1),
}


@mix
def written_through_views(prepare):
    """Where DTensor would write to a copy, or lose the write beside a plain tensor."""
    model = prepare(net())
    step(model)
    found = []
    for parameter in (model[0].weight, model[2].weight):
        for write in WRITTEN.values():
            with torch.no_grad():
                write(parameter, parameter.grad)
            found.append(parameter.detach().clone())
        product = parameter * parameter.grad
        product[0].mul_(parameter[1])
        product[2, 3] = 0.0
        product.fill_diagonal_(1.0)
        row = parameter.detach()[3].requires_grad_()
        found += torch.autograd.grad(row.square().sum(), row)
        found += torch.autograd.grad(product.square().sum(), parameter)
    mean, variance = model[0].bias.detach().clone(), model[0].bias.detach().square() + 1
    normed = F.batch_norm(torch.arange(96.0).view(4, 24), mean, variance, training=True)
    return *found, mean, variance, normed


@mix
def copies_of_views(prepare):
    """A part may be a view into the bucket in which it was reduced."""
    model = prepare(net())
    step(model)
    gradient = model[0].weight.grad
    if isinstance(gradient, DTensor):
        local = torch.cat([torch.zeros(5), gradient.to_local().flatten()])[5:].view_as(gradient.to_local())
        gradient = DTensor.from_local(local, gradient.device_mesh, gradient.placements)
    model[0].weight.grad = gradient
    file = io.BytesIO()
    torch.save({"gradient": gradient}, file)
    file.seek(0)
    assert copy.deepcopy(model)[0].weight.grad is None  # as of one device
    kept = copy.deepcopy([gradient, model[0].weight, gradient])
    assert kept[2] is kept[0] and isinstance(kept[1], nn.Parameter)
    step(model)
    return kept[0], kept[1], torch.load(file)["gradient"], model[0].weight.grad


mix.compare()
