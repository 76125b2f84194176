"""All-to-all: every rank sends a chunk to each; a split moves from one dim to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.collectives.c10d import OPS, Group, moved
from shardc.runtime.collectives.chunks import check_dim, chunks, joined, resized
from shardc.runtime.collectives.collective import Arguments, Collective, Held, Result, Sizes, Started, done
from shardc.runtime.mesh.mesh import current

__all__ = ["all_to_all"]


class _AllToAll(Collective[Arguments, Result]):
    """Transports take and give `(n, *chunk)`."""

    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        return torch.stack([operand[position] for operand in operands])

    def c10d(self, operand: Tensor, group: Group, op: str) -> Callable[[], Tensor]:
        even = [1] * group.size
        return moved(operand, group, lambda rows: OPS.all_to_all_single(rows, even, even, group.name))

    def sent(self, ways: int, size: float) -> float:
        return (ways - 1) / ways * size

    def shape(self, shape: Sizes, ways: int, told: Mapping[str, Any]) -> Sizes:
        dim, size = told["concat_dim"], told.get("size")
        padded = self.padded(shape, ways, told)
        split = resized(padded, told["split_dim"], padded[told["split_dim"]] // ways)
        return resized(split, dim, split[dim] * ways if size is None else size)

    def padded(self, shape: Sizes, ways: int, told: Mapping[str, Any]) -> Sizes:
        chunk = told.get("chunk")
        return shape if chunk is None else resized(shape, told["split_dim"], chunk * ways)

    def holds(self, told: Mapping[str, Any]) -> Held:
        return Held.COPY if told["split_dim"] else Held.OPERAND

    def joins(self, told: Mapping[str, Any]) -> bool:
        return bool(told["concat_dim"])

    def workspace(self, told: Mapping[str, Any], operand: int, result: int, started: bool) -> int:
        return 0 if started else result

    def dims(self, source: int | None, target: int | None) -> dict[str, int]:
        assert source is not None and target is not None, (source, target)
        return {"split_dim": target, "concat_dim": source}

    def sample(self, ways: int, near: int = 1) -> dict[str, Any]:
        return {"split_dim": 0, "concat_dim": 0}


@_AllToAll
def all_to_all(
    x: Tensor, *, split_dim: int, concat_dim: int, axis: str, chunk: int | None = None, size: int | None = None
) -> Started[Tensor]:
    """Moves a split from `concat_dim` to `split_dim`: `split_dim` shrinks n times (or to `chunk`), `concat_dim` grows n
    times (less the padding beyond `size`)."""
    context = current()
    n = context.size(axis)
    if n == 1:
        return done(x.contiguous())
    check_dim(x, concat_dim)
    parts = chunks(x, split_dim, n, chunk)
    return context.start(all_to_all, axis, parts, lambda arrived: joined(arrived, concat_dim, size))
