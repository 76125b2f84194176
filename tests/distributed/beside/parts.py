"""`data=` over gloo: every rank brings its own part of the batch, and trains like one device on all of it. Run by
torchrun with four processes."""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import shardc
from shardc import ShardcError, shard

dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
rank = dist.get_rank()


class Net(nn.Module):
    """A loss beside outputs, an input without batch, and one that is no tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x, labels=None, scale=None, factor=1.0):
        out = self.down(torch.tanh(self.up(x))) * factor
        if scale is not None:
            out = out * scale
        if labels is None:
            return out
        return {"loss": F.cross_entropy(out, labels), "logits": out, "mean": out.mean(0)}


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def same(one, other):
    torch.testing.assert_close(full(other).detach(), full(one).detach(), rtol=1e-9, atol=1e-12)


def sharing(mesh, data):
    """This rank's number among those that bring parts, and how many they are."""
    number, count, rest = 0, 1, rank
    sizes = [(name, int(size)) for name, size in (axis.split("=") for axis in mesh.split(","))]
    place = {}
    for name, size in reversed(sizes):
        rest, place[name] = divmod(rest, size)
    for name, size in sizes:
        if name in data.split(","):
            number, count = number * size + place[name], count * size
    return number, count


def batches():
    torch.manual_seed(1)
    for rows in (8, 8, 6, 3, 1, 8):
        yield torch.randn(rows, 12), torch.randint(0, 12, (rows,))


def trains(mesh, data):
    """Even parts, uneven ones and empty ones; the loss inside of the model."""
    number, count = sharing(mesh, data)
    one, many = Net(), shard(Net(), mesh=mesh, data=data, hardware="cpu")
    scale = torch.rand(12)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in (one, many)]
    for x, labels in batches():
        parts = [min(len(x), at * -(-len(x) // count)) for at in range(count + 1)]
        own = slice(parts[number], parts[number + 1])
        x_one, x_many = x.clone().requires_grad_(), x[own].clone().requires_grad_()
        expected = one(x_one, labels=labels, scale=scale, factor=2.0)
        got = many(x_many, labels=labels[own], scale=scale, factor=2.0)
        same(expected["loss"], got["loss"])
        same(expected["mean"], got["mean"])
        same(expected["logits"][own], got["logits"])
        assert type(got["logits"]) is torch.Tensor
        for optimizer, result in zip(optimizers, (expected, got), strict=True):
            optimizer.zero_grad()
            result["loss"].backward()
        same(x_one.grad[own], x_many.grad)
        for a, b in zip(one.parameters(), many.parameters(), strict=True):
            same(a.grad, b.grad)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            same(one(x)[own], many(x[own]))
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        same(a, b)


def loss_outside(mesh, data):
    """A mean that the caller makes of its own part, also where parts differ in size."""
    number, count = sharing(mesh, data)
    one, many = (
        Net(),
        shardc.compile(Net(), mesh, (torch.ones(8, 12),), data=data, hardware="cpu", dynamic={"x": {0: "n"}}),
    )
    many_net = many._module
    for sizes in ([2] * count, [1 + at for at in range(count)]):
        one.zero_grad()
        many_net.zero_grad()
        torch.manual_seed(2)
        x = torch.randn(sum(sizes), 12)
        start = sum(sizes[:number])
        one(x).square().mean().backward()
        many(x[start : start + sizes[number]]).square().mean().backward()
        for a, b in zip(one.parameters(), many_net.parameters(), strict=True):
            same(a.grad, b.grad)


def refusals(mesh, data):
    torch.manual_seed(rank)
    x = torch.randn(4, 12)
    for model, given, words in (
        (shard(Net(), mesh=mesh), x, "data="),
        (shard(Net(), mesh=mesh), torch.ones(4 + rank, 12), "data="),
    ):
        try:
            model(given)
            raise AssertionError("nobody said that inputs differ")
        except ShardcError as error:
            assert words in str(error) and "rank" in str(error), error
    if mesh == "dp=2,tp=2":
        model = shard(Net(), mesh=mesh, data=data)
        for given, words in ((torch.ones(4 + rank, 12), "rows"), (x, "tp")):
            try:
                model(given)
                raise AssertionError("ranks of tp bring different parts")
            except ShardcError as error:
                assert words in str(error) or "must bring the same" in str(error), error
    for wrong in ("batch", "dp,dp" if "dp" in mesh else "a,a"):
        try:
            shard(Net(), mesh=mesh, data=wrong)
            raise AssertionError("no such axis")
        except ShardcError as error:
            assert "data=" in str(error), error


for mesh, data in (("dp=2,tp=2", "dp"), ("dp=2,fsdp=2", "dp,fsdp"), ("a=4", "a")):
    for check in (trains, loss_outside, refusals):
        if sys.argv[1:] and check.__name__ not in sys.argv[1:]:
            continue
        check(mesh, data)
print("all parts are right", flush=True)
