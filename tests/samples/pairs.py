"""A small model, single and sharded, and whether both compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from shardc import shard

MESH = "dp=2,tp=2"


class MLP(nn.Module):
    """Module level, so that it can be pickled."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@shard(mesh=MESH)
class Decorated(MLP):
    """The decorator on a class."""


def pair(make: Callable[[], nn.Module] = MLP, **options: object) -> tuple[nn.Module, nn.Module]:
    """The same model single and sharded."""
    torch.manual_seed(0)
    single = make().double()
    return single, shard(copy.deepcopy(single), mesh=MESH, **options)  # type: ignore[arg-type]


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape or (4, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check(single: nn.Module, model: nn.Module, *x: Tensor) -> None:
    """Same output and, after backward, the same gradients."""
    for part in (single, model):
        part.zero_grad()
    one, other = single(*x), model(*x)
    torch.testing.assert_close(one, other)
    one.square().sum().backward()
    other.square().sum().backward()
    for (name, left), right in zip(single.named_parameters(), model.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None), name
        if left.grad is not None:
            torch.testing.assert_close(left.grad, right.grad)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(i)))
