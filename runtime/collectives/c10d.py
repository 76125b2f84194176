"""What the transports share that run torch's functional collectives: groups, and dtypes that gloo does not carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardc.runtime.collectives.reductions import REDUCTIONS
from shardc.runtime.errors import RankError

__all__: list[str] = []

OPS: Any = torch.ops._c10d_functional  # pyright: ignore[reportPrivateUsage]
# Gloo moves and reduces only these; the rest travels as bytes and is reduced in a wider type.
_GLOO = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8,
    torch.bool,
)  # fmt: skip
_WIDER = {torch.int16: torch.int32, torch.float8_e4m3fn: torch.float32, torch.float8_e5m2: torch.float32}


class Group(NamedTuple):
    """The ranks of one axis as torch knows them: the group's name, its `size`, this process's `position` in it."""

    name: str
    size: int
    position: int
    gloo: bool

    def carries(self, dtype: torch.dtype) -> bool:
        """Whether the backend moves and reduces tensors of `dtype`."""
        return not self.gloo or dtype in _GLOO


def moved(rows: Tensor, group: Group, move: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """What `move` brings of `rows`, which travel as bytes where the backend does not know their dtype. A tensor of no
    dims has no view as bytes: `rows` has at least one."""
    dtype = rows.dtype
    if group.carries(dtype):
        moving = move(rows)
        return lambda: landed(moving)
    moving = move(rows.unsqueeze(-1).view(torch.uint8))
    return lambda: landed(moving).view(dtype).squeeze(-1)


def reduced(operand: Tensor, group: Group, op: str, reduce: Callable[[Tensor, str], Tensor]) -> Callable[[], Tensor]:
    """What `reduce` makes of `operand` by torch's name of `op`, in a wider type where the backend does not know its
    dtype."""
    dtype = operand.dtype
    if not group.carries(dtype):
        if dtype not in _WIDER:
            raise RankError(f"gloo does not reduce {dtype}")
        operand = operand.to(_WIDER[dtype])
    reducing = reduce(operand, REDUCTIONS[op][1])
    return lambda: landed(reducing).to(dtype)


def landed(moving: Tensor) -> Tensor:
    """The result of a functional collective, once it is there."""
    return OPS.wait_tensor(moving)
