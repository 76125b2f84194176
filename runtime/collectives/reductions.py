"""The reductions of collectives, as both kinds of mesh run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shardc.runtime.errors import RankError

__all__: list[str] = []

REDUCTIONS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "sum": (torch.add, "sum"),
    "max": (torch.maximum, "max"),
    "min": (torch.minimum, "min"),
    "prod": (torch.mul, "product"),
}
"""By name: the function of two tensors, and what torch.distributed calls it."""


def check_op(op: str) -> None:
    """RankError for a reduction that there is none of."""
    if op not in REDUCTIONS:
        raise RankError(f"no reduction {op!r}: one of {', '.join(REDUCTIONS)}")


def reduced(operands: Sequence[Tensor], op: str) -> Tensor:
    """The reduction of tensors of one shape, in their order, in new memory."""
    combine, _ = REDUCTIONS[op]
    result = operands[0].clone()
    for other in operands[1:]:
        combine(result, other, out=result)
    return result
