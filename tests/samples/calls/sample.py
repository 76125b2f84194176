"""A sample call of an operator, and the numbers to call it with.

Sizes of samples are products of 2 and 3, so that axes of two and three ranks divide them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import shardc.rules  # noqa: F401  (the custom operators must exist)

_random = torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class View:
    """An operand that is a view of a base tensor."""

    base: Tensor
    target: Any
    args: tuple[Any, ...]


@dataclass
class Sample:
    """One call of an operator. `values`: which results are defined (the others are compared in shape only). `turn`: in
    which of how many micro-batches it runs."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    values: Sequence[int] | None = None
    tolerance: float = 1e-9
    turn: tuple[int, int] = (0, 1)

    def __str__(self) -> str:
        return (
            f"{self.target}({', '.join(_short(a) for a in self.args)}{', ' if self.kwargs else ''}{self.kwargs or ''})"
        )


def _short(value: Any) -> str:
    if isinstance(value, View):
        return f"{value.target}({_short(value.base)}, {value.args})"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_short(v) for v in value)}]"
    return repr(value)


def real(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_random, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, generator=_random, dtype=torch.float64) + 0.5


def whole(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=_random)


def boolean(*shape: int) -> Tensor:
    return torch.rand(shape, generator=_random) < 0.6


Group = Callable[[], Iterator[Sample]]
