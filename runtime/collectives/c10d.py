"""What all transports over torch's functional collectives share: groups, and dtypes that gloo does not carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardc.runtime.collectives.reductions import REDUCTIONS
from shardc.runtime.errors import RankError

__all__: list[str] = []

OPS: Any = torch.ops._c10d_functional  # pyright: ignore[reportPrivateUsage]
# Gloo moves and reduces only these. Others are moved as bytes, and reduced in a wider type.
_GLOO = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8,
    torch.bool,
)  # fmt: skip
_WIDER = {torch.int16: torch.int32, torch.float8_e4m3fn: torch.float32, torch.float8_e5m2: torch.float32}


class Group(NamedTuple):
    """The ranks of one axis as torch knows them: the group's name and `size`, and this process's `position` in it."""

    name: str
    size: int
    position: int
    gloo: bool

    def carries(self, dtype: torch.dtype) -> bool:
        """Whether the backend moves and reduces tensors of `dtype`."""
        return not self.gloo or dtype in _GLOO


def moved(rows: Tensor, group: Group, move: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """The result of `move` on `rows`, as a function that waits for it.

    `rows` are sent as bytes where the backend does not know their dtype. They have at least one dim, since a tensor
    without dims has no view as bytes.
    """
    dtype = rows.dtype
    if group.carries(dtype):
        moving = move(rows)
        return lambda: landed(moving)
    moving = move(rows.unsqueeze(-1).view(torch.uint8))
    return lambda: landed(moving).view(dtype).squeeze(-1)


def reduced(operand: Tensor, group: Group, op: str, reduce: Callable[[Tensor, str], Tensor]) -> Callable[[], Tensor]:
    """The result of `reduce(operand, torch's name of op)`, as a function that waits for it.

    The reduction runs in a wider type where the backend does not know the dtype. RankError where there is no wider one.
    """
    dtype = operand.dtype
    if not group.carries(dtype):
        if dtype not in _WIDER:
            raise RankError(f"gloo does not reduce tensors of {dtype}: cast the tensor, or run on CUDA devices")
        operand = operand.to(_WIDER[dtype])
    reducing = reduce(operand, REDUCTIONS[op][1])
    return lambda: landed(reducing).to(dtype)


def landed(moving: Tensor) -> Tensor:
    """Wait for a functional collective; its result."""
    return OPS.wait_tensor(moving)
