"""Writing where a mask or an index says so, with a value that has a gradient: autograd's own formula would ask which
elements were written, which a trace cannot know."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import shardc

MASK = torch.tensor([True, False, True, True, False, False])


def assigned(x: Tensor, value: Tensor) -> Tensor:
    x = x * 2
    x[MASK] = value
    return x


def assigned_in_full(x: Tensor, value: Tensor) -> Tensor:
    x = x * 2
    x[x > 0] = value.sum()
    return x


def put(x: Tensor, value: Tensor) -> Tensor:
    return torch.index_put(x, (MASK,), value)


def added(x: Tensor, value: Tensor) -> Tensor:
    return x.clone().index_put_((MASK,), value, accumulate=True)


def filled(x: Tensor, value: Tensor) -> Tensor:
    return x.index_fill(1, torch.tensor([3, 0]), value.sum()) + torch.index_fill(x, -1, torch.tensor([1]), value[0])


@pytest.mark.parametrize("function", [assigned, assigned_in_full, put, added, filled])
def test_masked_writes_equal_the_single_device(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, value = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 4), (4,)))
    made, expected = shardc.shard(function, mesh="a=2")(x, value), function(x, value)
    torch.testing.assert_close(made, expected)
    weights = torch.randn(6, 4, dtype=torch.float64)
    mine = torch.autograd.grad((made * weights).sum(), (x, value))
    torch.testing.assert_close(mine, torch.autograd.grad((expected * weights).sum(), (x, value)))


def test_other_writes_stay_as_they_are() -> None:
    def function(x: Tensor, value: Tensor) -> Tensor:
        x = x * 2
        x[1:3] = value
        x[torch.tensor([5, 0])] = value * 3
        x[:, 2] = 7
        return x

    x, value = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 4), (4,)))
    made, expected = shardc.shard(function, mesh="a=2")(x, value), function(x, value)
    torch.testing.assert_close(made, expected)
    mine = torch.autograd.grad(made.square().sum(), (x, value))
    torch.testing.assert_close(mine, torch.autograd.grad(expected.square().sum(), (x, value)))
