"""Autocast during a trace: what torch's autocast does to an operator, done for what is traced in the operator's place.

    with torch.autocast("cpu", dtype=torch.bfloat16):
        F.scaled_dot_product_attention(q, k, v)    # computes in bfloat16, also where q and k are float32

torch casts where it dispatches, and knows its own operators only. Operators of torch need nothing of this.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Given = TypeVar("Given", Tensor, Tensor | None)


def lowered(value: Given) -> Given:
    """An operand as the operators on torch's list for lower precision see it."""
    return _cast(value, torch.get_autocast_dtype("cpu"))


def widened(value: Given) -> Given:
    """An operand as the operators on torch's list for float32 see it."""
    return _cast(value, torch.float32)


def off() -> torch.autocast:
    """Without autocast, as the body of an operator runs that torch has on a list."""
    return torch.autocast("cpu", enabled=False)


def _cast(value: Given, dtype: torch.dtype) -> Given:
    if value is None or not torch.is_autocast_enabled("cpu"):
        return value
    eligible = value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if eligible and value.dtype != dtype else value
