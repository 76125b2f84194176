"""Custom operators without rules, many of them made to mislead a trial: what each truly is stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

FOUND: dict[str, tuple[tuple[Any, ...], str]] = {}
"""Per operator: the arguments of a call, and the text of the rule that a trial should find."""


def odd(text: str, *args: Any, like: Callable[..., Any] | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as operator `odd::name`; `like` makes the results' shapes (default: by running it)."""

    def register(function: Callable[..., Any]) -> Any:
        operator = custom_op(f"odd::{function.__name__}", function, mutates_args=())
        operator.register_fake(like or function)
        FOUND[function.__name__] = args, text
        return operator

    return register


def real(*shape: int) -> Tensor:
    return torch.empty(shape)


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@odd("a b -> a b", real(8, 6))
def threshold_far_out(x: Tensor) -> Tensor:
    """Linear up to a clamp that moderate inputs never meet."""
    return x.clamp(-1e9, 1e9)


@odd("a b -> a b", real(8, 6))
def dead_zone(x: Tensor) -> Tensor:
    """Linear but for tiny inputs."""
    return torch.where(x.abs() < 1e-9, torch.zeros_like(x), x)


@odd("a b -> a", real(8, 6))
def sum_of_squares(x: Tensor) -> Tensor:
    return x.square().sum(1)


@odd("a b! -> a", real(8, 6))
def norm(x: Tensor) -> Tensor:
    return x.norm(dim=1)


@odd("a b:max -> a", real(8, 6))
def largest_magnitude(x: Tensor) -> Tensor:
    return x.abs().amax(1)


@odd("a b! -> a", real(8, 6))
def clamped_sum(x: Tensor) -> Tensor:
    """For positive inputs a plain sum."""
    return x.sum(1).clamp_min(0)


@odd("a b! -> a", ints(8, 6))
def clamped_integer_sum(x: Tensor) -> Tensor:
    return x.sum(1).clamp_min(0)


@odd("a! b! -> c! d!", real(8, 6))
def globally_normalized(x: Tensor) -> Tensor:
    return x / x.abs().sum()


@odd("a! b! -> c! d!", real(8, 6))
def rarely_coupled(x: Tensor) -> Tensor:
    """Elementwise unless some element, anywhere, is infinite."""
    return torch.where(x.isinf().any(), torch.zeros_like(x), x)


@odd("a b! -> a c!", real(8, 6))
def running_sum(x: Tensor) -> Tensor:
    return x.cumsum(1)


@odd("a b! -> a c!", real(8, 6))
def stably_sorted(x: Tensor) -> Tensor:
    return x.sort(dim=1, stable=True).indices


@odd("a b! -> a c!", real(8, 6))
def rotated_pairs(x: Tensor) -> Tensor:
    """A cut at an even point is right, one at an odd point is not, and neither is the minor part of the dim."""
    even, odd_ = x[:, ::2], x[:, 1::2]
    return torch.stack([-odd_, even], -1).flatten(1)


@odd("a b! -> a c!", real(8, 6))
def rotated_halves(x: Tensor) -> Tensor:
    one, other = x.chunk(2, 1)
    return torch.cat([-other, one], 1)


@odd("a b -> a b", real(8, 6), 0)
def rolled_by_nothing(x: Tensor, shift: int) -> Tensor:
    return x.roll(shift, 1)


@odd("a b! -> a c!", real(8, 6), 2)
def rolled(x: Tensor, shift: int) -> Tensor:
    return x.roll(shift, 1)


@odd("a b -> b a", real(8, 8))
def turned(x: Tensor) -> Tensor:
    """A square whose dims only values can tell apart."""
    return x.t().clone()


@odd("a b, b c -> a c", real(8, 8), real(8, 8))
def square_product(x: Tensor, y: Tensor) -> Tensor:
    return x @ y


@odd("a c!, d!, b e! -> a b", real(8, 8), real(8), real(8, 8))
def gated_product(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """The contracted dim is normalized before it is summed."""
    return (x * gate.softmax(0)) @ y.t()


@odd("a b, c b, b -> a c", real(8, 8), real(8, 8), real(8))
def scaled_product(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return (x * scale) @ y.t()


@odd("a b!, a -> a", real(8, 6), real(8))
def plus_squares(x: Tensor, y: Tensor) -> Tensor:
    return y + x.square().sum(1)


@odd("a -> b!", real(6), 6, like=lambda x, n: x.new_empty(n))
def counted(x: Tensor, n: int) -> Tensor:
    """The number equals the size of the dim that is summed, and is not that size."""
    return torch.arange(n, dtype=x.dtype) * x.sum()


@odd("a b -> a b", real(8, 6), 6, like=lambda x, n: x.new_empty(x.shape[0], n))
def sized(x: Tensor, width: int) -> Tensor:
    """The number must shrink along with the dim."""
    return x.reshape(-1, width) * 2


@odd("a b -> a c!, a", real(8, 6), like=lambda x: (x.new_empty(x.shape[0], 2), x.new_empty(x.shape[0])))
def two_results(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.stack([x.sum(1), -x.sum(1)], 1), x.sum(1)


@odd("a! b! -> c! d!", real(8, 6))
def nothing_splits(x: Tensor) -> Tensor:
    return x - x.median()
