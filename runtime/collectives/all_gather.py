"""All-gather: every rank gets the chunks of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.collectives.c10d import OPS, Group, moved
from shardc.runtime.collectives.chunks import check_dim, joined, resized
from shardc.runtime.collectives.collective import Arguments, Collective, Result, Sizes, Started, done
from shardc.runtime.mesh.mesh import current
from shardc.runtime.mesh.orders import BLOCKS

__all__ = ["all_gather"]


class _AllGather(Collective[Arguments, Result]):
    """Transports take any shape and return `(n, *shape)`."""

    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        return torch.stack(list(operands))

    def c10d(self, operand: Tensor, group: Group, op: str) -> Callable[[], Tensor]:
        return moved(operand.unsqueeze(0), group, lambda rows: OPS.all_gather_into_tensor(rows, group.size, group.name))

    def sent(self, ranks: int, size: float) -> float:
        return (ranks - 1) * size

    def shape(self, shape: Sizes, ranks: int, keywords: Mapping[str, Any]) -> Sizes:
        dim, size = keywords["dim"], keywords.get("size")
        return resized(shape, dim, shape[dim] * ranks if size is None else size)

    def result_bytes(self, ranks: int, size: float) -> float:
        return size * ranks

    def joins(self, keywords: Mapping[str, Any]) -> bool:
        return bool(keywords["dim"] or "order" in keywords)

    def workspace(self, keywords: Mapping[str, Any], operand: int, result: int, started: bool) -> int:
        return result if self.joins(keywords) and not started else 0

    def sample(self, ranks: int, near: int = 1) -> dict[str, Any]:
        return {"dim": 0}


@_AllGather
def all_gather(x: Tensor, *, dim: int, axis: str, size: int | None = None, order: str = BLOCKS) -> Started[Tensor]:
    """The chunks of all ranks side by side along `dim`, which grows n times, or to `size` if padding is cut off.

    RankError where the mesh has no such axis, or `x` no such dim.
    """
    context = current()
    if context.size(axis) == 1:
        return done(x.contiguous())
    check_dim(x, dim)
    return context.start(all_gather, axis, x, lambda parts: joined(parts, dim, size, order))
