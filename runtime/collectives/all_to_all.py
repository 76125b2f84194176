"""All-to-all: every rank sends a chunk to every other, which moves a split from one dim to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.collectives.c10d import OPS, Group, moved
from shardc.runtime.collectives.chunks import check_dim, chunks, joined, resized
from shardc.runtime.collectives.collective import Arguments, Collective, Held, Result, Sizes, Started, done
from shardc.runtime.mesh.mesh import current
from shardc.runtime.mesh.orders import BLOCKS

__all__ = ["all_to_all"]


class _AllToAll(Collective[Arguments, Result]):
    """Transports take and return `(n, *chunk)`."""

    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        return torch.stack([operand[position] for operand in operands])

    def c10d(self, operand: Tensor, group: Group, op: str) -> Callable[[], Tensor]:
        even = [1] * group.size
        return moved(operand, group, lambda rows: OPS.all_to_all_single(rows, even, even, group.name))

    def sent(self, ranks: int, size: float) -> float:
        return (ranks - 1) / ranks * size

    def shape(self, shape: Sizes, ranks: int, keywords: Mapping[str, Any]) -> Sizes:
        dim, size = keywords["concat_dim"], keywords.get("size")
        padded = self.padded(shape, ranks, keywords)
        split = resized(padded, keywords["split_dim"], padded[keywords["split_dim"]] // ranks)
        return resized(split, dim, split[dim] * ranks if size is None else size)

    def padded(self, shape: Sizes, ranks: int, keywords: Mapping[str, Any]) -> Sizes:
        chunk = keywords.get("chunk")
        return shape if chunk is None else resized(shape, keywords["split_dim"], chunk * ranks)

    def holds(self, keywords: Mapping[str, Any]) -> Held:
        return Held.COPY if keywords["split_dim"] or "split_order" in keywords else Held.OPERAND

    def joins(self, keywords: Mapping[str, Any]) -> bool:
        return bool(keywords["concat_dim"] or "concat_order" in keywords)

    def workspace(self, keywords: Mapping[str, Any], operand: int, result: int, started: bool) -> int:
        return 0 if started else result

    def dims(self, source: int | None, target: int | None) -> dict[str, int]:
        assert source is not None and target is not None, (source, target)
        return {"split_dim": target, "concat_dim": source}

    def orders(self, source: str, target: str) -> dict[str, str]:
        named = {"split_order": target, "concat_order": source}
        return {name: order for name, order in named.items() if order != BLOCKS}

    def sample(self, ranks: int, near: int = 1) -> dict[str, Any]:
        return {"split_dim": 0, "concat_dim": 0}


@_AllToAll
def all_to_all(
    x: Tensor, *, split_dim: int, concat_dim: int, axis: str, chunk: int | None = None, size: int | None = None,
    split_order: str = BLOCKS, concat_order: str = BLOCKS,
) -> Started[Tensor]:  # fmt: skip
    """Moves a split from `concat_dim` to `split_dim`.

    `split_dim` shrinks n times, or to `chunk` elements with padding. `concat_dim` grows n times, or to `size` elements
    without its padding. Each has its own order. RankError where a dim, an order or the axis does not exist, or
    `split_dim` does not split evenly.
    """
    context = current()
    n = context.size(axis)
    if n == 1:
        return done(x.contiguous())
    check_dim(x, concat_dim)
    parts = chunks(x, split_dim, n, chunk, split_order)
    return context.start(all_to_all, axis, parts, lambda arrived: joined(arrived, concat_dim, size, concat_order))
