"""Narrow dtypes. Of 16 bits: torch's kernels compute with them in float32, and so do those of the runtime. Of 8 bits:
they are multiplied by a kernel of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["scaled_mm"]

LOW = (torch.float16, torch.bfloat16)


def widened(x: Tensor) -> Tensor:
    """`x` in the dtype in which torch's kernels compute with it."""
    return x.float() if x.dtype in LOW else x


def scaled_mm(x: Tensor, weight: Tensor, *scales: Any, **options: Any) -> Tensor:
    """`torch._scaled_mm` of `x` [m, k] and `weight` [k, n], in whichever memory order conversions leave them: the
    kernel reads the right operand column by column."""
    columns = weight if weight.stride(0) == 1 else weight.t().contiguous().t()
    return torch.ops.aten._scaled_mm.default(x.contiguous(), columns, *scales, **options)
