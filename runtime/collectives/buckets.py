"""Buckets: several tensors of one dtype go through one collective, over a flat buffer that holds one after another.

Every element is reduced over the same ranks as by a collective of its own. What comes back are pieces of one buffer:
its memory is free when nobody holds any of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shardc.runtime.collectives.basic import all_reduce, check_op, chunks, reduce_scatter
from shardc.runtime.collectives.started import Collective, Started, done
from shardc.runtime.errors import RankError
from shardc.runtime.mesh.mesh import current


@Collective
def all_reduce_bucket(parts: Sequence[Tensor], *, axis: str, op: str = "sum") -> Started[tuple[Tensor, ...]]:
    """`all_reduce` of every tensor, in one."""
    _check(parts)
    check_op(op)
    context = current()
    if context.size(axis) == 1:
        return done(tuple(all_reduce(part, axis=axis, op=op) for part in parts))
    shapes = [part.shape for part in parts]
    buffer = torch.cat([part.flatten() for part in parts])
    return context.start("all_reduce", axis, buffer, lambda reduced: _pieces(reduced, shapes), op)


@Collective
def reduce_scatter_bucket(
    parts: Sequence[Tensor],
    *,
    dims: Sequence[int],
    axis: str,
    op: str = "sum",
    sizes: Sequence[int | None] | None = None,
) -> Started[tuple[Tensor, ...]]:
    """`reduce_scatter` of every tensor along its own of `dims`, into a chunk of its own of `sizes`, in one."""
    _check(parts)
    check_op(op)
    context = current()
    n, wanted = context.size(axis), [None] * len(parts) if sizes is None else sizes
    if not len(parts) == len(dims) == len(wanted):
        raise RankError(f"a bucket of {len(parts)} tensors has {len(dims)} dims and {len(wanted)} sizes")
    if n == 1:
        scattered = zip(parts, dims, wanted, strict=True)
        return done(tuple(reduce_scatter(part, dim=dim, axis=axis, op=op, chunk=size) for part, dim, size in scattered))
    own = [chunks(part, dim, n, size) for part, dim, size in zip(parts, dims, wanted, strict=True)]
    shapes = [one.shape[1:] for one in own]
    buffer = parts[0].new_empty(n, sum(map(math.prod, shapes)))
    start = 0
    for one, shape in zip(own, shapes, strict=True):
        buffer[:, start : start + math.prod(shape)].view(one.shape).copy_(one)
        start += math.prod(shape)
    return context.start("reduce_scatter", axis, buffer, lambda reduced: _pieces(reduced, shapes), op)


def _check(parts: Sequence[Tensor]) -> None:
    dtypes = {part.dtype for part in parts}
    if len(dtypes) != 1:
        names = ", ".join(sorted(map(str, dtypes))) or "none at all"
        raise RankError(f"a bucket holds tensors of one dtype, not {names}")


def _pieces(buffer: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """Views of the buffer, one after another. (Not by `split`, whose results may not be written to.)"""
    found: list[Tensor] = []
    start = 0
    for shape in shapes:
        found.append(buffer[start : start + math.prod(shape)].view(shape))
        start += math.prod(shape)
    return tuple(found)
