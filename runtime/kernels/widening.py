"""Dtypes too narrow for sums: torch's kernels compute with them in float32, and so do those of the runtime."""

from __future__ import annotations

import torch
from torch import Tensor

__all__: list[str] = []

LOW = (torch.float16, torch.bfloat16)


def widened(x: Tensor) -> Tensor:
    """`x` in the dtype in which torch's kernels compute with it."""
    return x.float() if x.dtype in LOW else x
