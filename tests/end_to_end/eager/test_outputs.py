"""How outputs and gradients lie in memory: as on one device, so that `view` and writes do what they do there."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc
from shardc import shard

MESHES = ("dp=2,tp=2", "a=3")


class Rows(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(12, 12), function

    def forward(self, x: Tensor) -> object:
        return self.function(self.layer(x))


class Picture(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer, self.norm, self.function = nn.Conv2d(6, 12, 3, padding=1), nn.BatchNorm2d(12), function

    def forward(self, x: Tensor) -> object:
        return self.function(F.relu(self.norm(self.layer(x))))


def heads(h: Tensor) -> Tensor:
    return h.unflatten(-1, (3, 4)).transpose(1, 2)


ROWS: dict[str, Callable[[Tensor], object]] = {
    "as they are": lambda h: h,
    "transposed": lambda h: (h.mT, h.mT.contiguous(), h.transpose(0, 1)),
    "turned": lambda h: (h.permute(2, 0, 1), h.permute(2, 0, 1).contiguous(), h.movedim(-1, 0).sin()),
    "heads": lambda h: (heads(h), heads(h).contiguous(), heads(h).flatten(1, 2)),
    "attention": lambda h: F.scaled_dot_product_attention(heads(h), heads(h), heads(h)),
    "product": lambda h: (h @ h.mT, (h.mT @ h).mT, torch.einsum("abc,adc->dab", h, h)),
    "widened": lambda h: (h[:, None].expand(-1, 2, -1, -1), h.mean(-1, keepdim=True)),
    "sorted": lambda h: h.mT.sort(dim=1),
    "joined": lambda h: torch.cat([h.mT, h.mT], 1),
    "stacked": lambda h: torch.stack([h.mT, h.mT]).unbind(0),
}
PICTURES: dict[str, Callable[[Tensor], object]] = {
    "as they are": lambda h: h,
    "pooled": lambda h: (F.max_pool2d(h, 2), F.avg_pool2d(h, 2), F.adaptive_avg_pool2d(h, 1)),
    "channels last": lambda h: h.contiguous(memory_format=torch.channels_last),
    "contiguous": lambda h: h.contiguous(),
    "flat": lambda h: (h.flatten(2).mT, h.flatten(2).mT.contiguous()),
}


def same_memory(one: object, other: object) -> None:
    left, right = (value if isinstance(value, (tuple, list)) else (value,) for value in (one, other))
    for expected, made in zip(left, right, strict=True):
        torch.testing.assert_close(made, expected)
        assert made.stride() == expected.stride(), (made.stride(), expected.stride())


def check(make: Callable[[], nn.Module], mesh: str, x: Tensor, order: torch.memory_format) -> None:
    torch.manual_seed(0)
    single = make().double().to(memory_format=order)
    sharded = shard(copy.deepcopy(single), mesh=mesh, hardware="cpu")
    with torch.no_grad():
        made, expected = sharded(x), single(x)
    if isinstance(expected, tuple) and any(0 in value.stride() for value in expected):
        assert all(0 not in value.stride() for value in made)  # each element has its own memory
        made, expected = made[1:], expected[1:]
    same_memory(expected, made)
    results: list[list[Tensor]] = []
    for model in (single, sharded):
        leaf = x.detach().requires_grad_()
        made = model(leaf)
        first: Tensor = made if isinstance(made, Tensor) else made[0]
        results.append([*torch.autograd.grad(first.square().sum(), leaf)])
        model.zero_grad()
        model(leaf)[0].sum().backward()
        results[-1] += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    same_memory(*results)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, mesh: str) -> None:
    check(lambda: Rows(ROWS[name]), mesh, torch.randn(6, 8, 12, dtype=torch.float64), torch.preserve_format)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name: str, order: torch.memory_format) -> None:
    x = torch.randn(6, 6, 8, 8, dtype=torch.float64).contiguous(memory_format=order)
    check(lambda: Picture(PICTURES[name]), "dp=2,tp=2", x, order)


def test_sizes_that_change() -> None:
    asked = dict(dynamic={"x": {0: "batch"}}, hardware="cpu")
    function = ROWS["transposed"]
    with torch.no_grad():
        compiled = shardc.compile(
            Rows(function).double(), "a=2", (torch.randn(6, 8, 12, dtype=torch.float64),), **asked
        )
        for batch in (6, 4):
            made = compiled(torch.randn(batch, 8, 12, dtype=torch.float64))
            expected = function(torch.empty(batch, 8, 12))
            assert [value.stride() for value in made] == [value.stride() for value in expected]  # type: ignore[attr-defined]


def test_outputs_may_be_written_in_place() -> None:
    results: list[list[Tensor | None]] = []
    torch.manual_seed(0)
    single = Rows(lambda h: (h, h.tanh())).double()
    for model in (single, shard(copy.deepcopy(single), mesh="a=2", hardware="cpu")):
        out = model(torch.ones(6, 8, 12, dtype=torch.float64))[0]
        out.add_(1).mul_(2)
        F.relu(out, inplace=True).sum().backward()
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*results)
