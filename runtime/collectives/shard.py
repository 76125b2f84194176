"""Shard: every rank keeps its chunk of a tensor that is whole on every rank. Local: nothing is sent."""

from __future__ import annotations

import torch
from torch import Tensor

from shardc.runtime.collectives.chunks import KeepsChunk, check_dim, check_order, chunks
from shardc.runtime.collectives.collective import Arguments, Local, Result, Started, done
from shardc.runtime.mesh.mesh import current
from shardc.runtime.mesh.orders import BLOCKS, dealt

__all__ = ["shard"]


class _Shard(KeepsChunk, Local[Arguments, Result]):
    keeps_part = True


@_Shard
def shard(x: Tensor, *, dim: int, axis: str, chunk: int | None = None, order: str = BLOCKS) -> Started[Tensor]:
    """This rank's chunk of `dim`: an even part, or `chunk` elements, the last ones padded. Local: nothing is sent.

    RankError where `dim`, `axis` or `order` do not exist, or `dim` does not split evenly.
    """
    context = current()
    n = context.size(axis)
    check_dim(x, dim)
    if n == 1 and chunk is None:
        return done(x.contiguous())
    if order != BLOCKS:
        check_order(x, dim, n, order)
        return done(dealt(x, dim, order, n, context.coordinates[axis]))
    # a copy even of a contiguous chunk, because a view would keep the whole of x in memory
    return done(chunks(x, dim, n, chunk)[context.coordinates[axis]].clone(memory_format=torch.contiguous_format))
