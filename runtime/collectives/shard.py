"""Shard: every rank keeps its chunk of a tensor that is whole on every rank. Local: nothing is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.collectives.chunks import check_dim, chunks, resized
from shardc.runtime.collectives.collective import Arguments, Local, Result, Sizes, Started, done
from shardc.runtime.mesh.mesh import current

__all__ = ["shard"]


class _Shard(Local[Arguments, Result]):
    keeps_part = True

    def shape(self, shape: Sizes, ranks: int, keywords: Mapping[str, Any]) -> Sizes:
        dim, chunk = keywords["dim"], keywords.get("chunk")
        return resized(shape, dim, shape[dim] // ranks if chunk is None else chunk)

    def padded(self, shape: Sizes, ranks: int, keywords: Mapping[str, Any]) -> Sizes:
        chunk = keywords.get("chunk")
        return shape if chunk is None else resized(shape, keywords["dim"], chunk * ranks)

    def result_bytes(self, ranks: int, size: float) -> float:
        return size / ranks


@_Shard
def shard(x: Tensor, *, dim: int, axis: str, chunk: int | None = None) -> Started[Tensor]:
    """This rank's chunk of `dim`: an even part, or `chunk` elements, the last ones padded. Local: nothing is sent.

    RankError where `dim` or `axis` do not exist, or `dim` does not split evenly.
    """
    context = current()
    n = context.size(axis)
    check_dim(x, dim)
    if n == 1 and chunk is None:
        return done(x.contiguous())
    # a copy even of a contiguous chunk, because a view would keep the whole of x in memory
    return done(chunks(x, dim, n, chunk)[context.coordinates[axis]].clone(memory_format=torch.contiguous_format))
