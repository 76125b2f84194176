"""Micro-batches: values and random numbers of the whole batch, one reduction of gradients a step, less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc
from samples.models import HandGPT
from shardc import ShardcError

WAYS = {
    "whole": {"up": ("dp", None)},
    "split": {"up": ("dp", "tp"), "up.weight": ("dp", None), "down.weight": (None, ("dp", "tp"))},
}


class Net(nn.Module):
    """A loss over the labels that count, dropout, a penalty on a weight, and if asked for, what the loss is made of."""

    def __init__(self, outputs: bool) -> None:
        super().__init__()
        self.outputs = outputs
        self.up, self.norm, self.down = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)
        self.frozen = nn.Parameter(torch.ones(16), requires_grad=False)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        self.steps += 1
        hidden = F.dropout(self.norm(torch.relu(self.up(x))), 0.2, self.training)
        logits = self.down(hidden) * self.frozen
        loss = F.cross_entropy(logits, labels) + 0.1 * self.up.weight.square().sum().sqrt()
        return (logits, logits.mean(0), loss) if self.outputs else loss


def batch(rows: int = 24) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    labels = torch.randint(16, (rows,))
    labels[2:9] = -100
    return torch.randn(rows, 16, dtype=torch.float64), labels


def stepped(model: nn.Module, loss: Callable[[Any], Tensor], times: int = 1) -> list[Tensor]:
    """What a step leaves: results, gradients of inputs and parameters, buffers, and where the random stream stands."""
    torch.manual_seed(1)
    x, labels = batch()
    x.requires_grad_()
    made = model(x, labels)
    for _ in range(times):
        loss(made).backward(retain_graph=times > 1)
    assert x.grad is not None
    results = [made] if isinstance(made, Tensor) else [*made]
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    return [*results, x.grad, *gradients, *model.buffers(), torch.rand(2)]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module", params=WAYS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    one = Net(outputs=False).double()
    many = copy.deepcopy(one)
    asked = WAYS[request.param]
    return one, shardc.shard(many, mesh="dp=2,tp=2", microbatches=3, mode="propagate", constraints=asked)


def test_a_loss_is_that_of_the_batch(pair: tuple[nn.Module, nn.Module]) -> None:
    one, many = pair
    for factor, times in ((1.0, 1), (0.7, 2)):

        def loss(made: Any, factor: float = factor) -> Tensor:
            return made * factor

        same(stepped(many, loss, times), stepped(one, loss, times))
    assert "AT_ONCE = True" in many.code
    with torch.no_grad():
        torch.manual_seed(1)
        expected = one(*batch())
        torch.manual_seed(1)
        torch.testing.assert_close(many(*batch()), expected)


def test_gradients_are_reduced_once_a_step(pair: tuple[nn.Module, nn.Module]) -> None:
    _, many = pair
    many.zero_grad()
    mesh = many.compiled.executable.mesh
    loss = many(*batch())
    forward = dict(mesh.traffic)
    mesh.reset()
    loss.backward()
    reduced = dict(mesh.traffic)
    with shardc.accumulate(many):
        for _ in range(2):
            many(*batch()).backward()
        mesh.reset()
    assert mesh.traffic == pytest.approx(reduced)
    assert forward.keys() == reduced.keys()


def test_several_outputs() -> None:
    """There is no gradient before all of them are known: backward runs forward again."""
    torch.manual_seed(0)
    one = Net(outputs=True).double()
    many = shardc.shard(copy.deepcopy(one), mesh="dp=2", microbatches=4, mode="propagate", constraints=WAYS["whole"])

    def loss(made: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return made[0].square().mean() + made[1].sum() + 2.0 * made[2]

    same(stepped(many, loss), stepped(one, loss))  # type: ignore[arg-type]


def test_a_language_model() -> None:
    """With repeated layers, dropout, an embedding that is tied, and ids."""
    torch.manual_seed(0)
    one = HandGPT(width=16, heads=2, length=8).double()
    many = shardc.shard(copy.deepcopy(one), mesh="dp=2", microbatches=2, hardware="h100", memory="unbounded")
    ids = torch.randint(0, 128, (4, 8))
    found: list[list[Tensor]] = []
    for model in (many, one):
        torch.manual_seed(1)
        loss = model(ids, ids.roll(-1, 1))
        loss.backward()
        found.append([loss, *(one.grad for one in model.parameters() if one.grad is not None)])
    same(*found)


class Tower(nn.Module):
    """Layers that keep what they compute for backward, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.GELU())))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def test_a_device_holds_the_activations_of_one_micro_batch() -> None:
    with torch.device("meta"):
        model, x = Tower(), torch.empty(4096, 64)
    one, eight = (shardc.compile(model, "dp=2", (x,), microbatches=count).plan for count in (1, 8))
    key = "kept for backward"
    assert eight.memory.parts[key] == pytest.approx(one.memory.parts[key] / 8, rel=0.01)
    assert eight.memory.peak < 0.5 * one.memory.peak


class Coupled(nn.Module):
    """What mixes samples, in a way that is named."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.inner, self.norm = way, nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        made = self.inner(x)
        if self.way == "norm":
            return self.norm(made).square().sum()
        if self.way == "contrast":
            return F.cross_entropy(made @ made.T, torch.arange(len(x)))
        return made.cumsum(0).mean()


@pytest.mark.parametrize(("way", "named"), [("norm", r"div \(norm, "), ("contrast", r"mm \("), ("scan", r"cumsum \(")])
def test_what_couples_samples_is_refused_by_name(way: str, named: str) -> None:
    model = shardc.shard(Coupled(way), mesh="dp=2", microbatches=2)
    with pytest.raises(ShardcError, match=rf"microbatches=2: {named}.*test_microbatches.py:\d+\) needs values of all"):
        model(torch.randn(8, 8))
    model.eval()
    if way == "norm":
        model(torch.randn(8, 8)).backward()


def test_what_cannot_be_asked_for() -> None:
    x = torch.randn(8, 8)
    for count, mesh, said in (
        (3, "dp=2", "does not divide the batch: dim 0 of input:0 has 8 rows; choose one of 2, 4, 8"),
        (2, "time=2", "has an axis 'time'"),
        (0, "dp=2", "microbatches=0 must be a whole number, 1 or more"),
    ):
        with pytest.raises(ShardcError, match=said):
            shardc.compile(nn.Linear(8, 8), mesh, (x,), microbatches=count)
    with pytest.raises(ShardcError, match="no input of the program is a tensor"):
        shardc.compile(nn.Flatten(0), "dp=2", (torch.zeros(()),), microbatches=2)


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        heads = (x * self.scale).view(len(x), 2, 4, 8)
        seen = F.scaled_dot_product_attention(heads.detach(), heads.detach(), heads, dropout_p=0.5).view(x.shape)
        return F.dropout(x * self.scale, 0.5) + seen


def test_independent_masks_differ_from_micro_batch_to_micro_batch() -> None:
    model = shardc.shard(Drops(), mesh="dp=2", microbatches=2, randomness="independent")
    x, parts = torch.ones(8, 64, requires_grad=True), list[Tensor]()
    for _ in range(2):
        torch.manual_seed(0)
        parts.append(model(x))
    assert torch.equal(*parts)
    rows = parts[0].detach()
    assert len({tuple(row.tolist()) for row in rows}) == 8
    parts[0].sum().backward()
    assert x.grad is not None  # what is linear in x is the product of x and its gradient, if the masks are the same
    torch.testing.assert_close((x.grad * x.detach()).sum(1), rows.sum(1))
