"""The reductions of collectives, on virtual meshes and under torch.distributed."""

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
"""By name, the function of two tensors and torch.distributed's name."""


def check_op(op: str) -> None:
    """RankError unless `op` is the name of a reduction."""
    if op not in REDUCTIONS:
        raise RankError(f"there is no reduction {op!r}; use one of {', '.join(REDUCTIONS)}")


def reduced(operands: Sequence[Tensor], op: str) -> Tensor:
    """The reduction of tensors of one shape, in their order, in new memory."""
    combine, _ = REDUCTIONS[op]
    result = operands[0].clone() if len(operands) == 1 else combine(operands[0], operands[1])
    for other in operands[2:]:
        combine(result, other, out=result)
    return result
