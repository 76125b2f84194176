"""All-gather: every rank gets the chunks of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.collectives.c10d import OPS, Group, moved
from shardc.runtime.collectives.chunks import check_dim, joined, resized
from shardc.runtime.collectives.collective import Arguments, Collective, Result, Sizes, Started, done
from shardc.runtime.mesh.mesh import current

__all__ = ["all_gather"]


class _AllGather(Collective[Arguments, Result]):
    """Transports take any shape and give `(n, *shape)`."""

    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        return torch.stack(list(operands))

    def c10d(self, operand: Tensor, group: Group, op: str) -> Callable[[], Tensor]:
        return moved(operand.unsqueeze(0), group, lambda rows: OPS.all_gather_into_tensor(rows, group.size, group.name))

    def sent(self, ways: int, size: float) -> float:
        return (ways - 1) * size

    def shape(self, shape: Sizes, ways: int, told: Mapping[str, Any]) -> Sizes:
        dim, size = told["dim"], told.get("size")
        return resized(shape, dim, shape[dim] * ways if size is None else size)

    def result_bytes(self, ways: int, size: float) -> float:
        return size * ways

    def joins(self, told: Mapping[str, Any]) -> bool:
        return bool(told["dim"])

    def workspace(self, told: Mapping[str, Any], operand: int, result: int, started: bool) -> int:
        return result if told["dim"] and not started else 0

    def sample(self, ways: int, near: int = 1) -> dict[str, Any]:
        return {"dim": 0}


@_AllGather
def all_gather(x: Tensor, *, dim: int, axis: str, size: int | None = None) -> Started[Tensor]:
    """The chunks of all ranks side by side: dim grows n times, less the padding beyond its `size`."""
    context = current()
    if context.size(axis) == 1:
        return done(x.contiguous())
    check_dim(x, dim)
    return context.start(all_gather, axis, x, lambda parts: joined(parts, dim, size))
