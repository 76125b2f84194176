"""Products of 8-bit numbers, for which the right operand must lie column by column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["scaled_mm"]


def scaled_mm(x: Tensor, weight: Tensor, *scales: Any, **options: Any) -> Tensor:
    """`torch._scaled_mm` of `x` [m, k] and `weight` [k, n], whatever their memory order, as conversions leave it."""
    columns = weight if weight.stride(0) == 1 else weight.t().contiguous().t()
    return torch.ops.aten._scaled_mm.default(x.contiguous(), columns, *scales, **options)
