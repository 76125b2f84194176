"""Several reduce-scatters as one, over a flat buffer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from shardc.runtime.collectives import c10d
from shardc.runtime.collectives.bucket import Bucket, check_dtype, pieces
from shardc.runtime.collectives.chunks import chunks
from shardc.runtime.collectives.collective import Arguments, Result, Started, done
from shardc.runtime.collectives.reduce_scatter import reduce_scatter
from shardc.runtime.collectives.reductions import check_op
from shardc.runtime.errors import RankError
from shardc.runtime.mesh.mesh import current

__all__ = ["reduce_scatter_bucket"]


class _ReduceScatterBucket(Bucket[Arguments, Result]):
    of = reduce_scatter
    writes_operand = True

    def c10d(self, operand: Tensor, group: c10d.Group, op: str) -> Callable[[], Tensor]:
        if not group.gloo:
            return super().c10d(operand, group, op)
        # torch's own for gloo is an all-reduce of a copy of the buffer
        arrived = c10d.reduced(operand, group, op, lambda x, how: c10d.OPS.all_reduce_(x, how, group.name))
        return lambda: arrived()[group.position].clone()

    def members(self, keywords: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
        sizes = keywords.get("sizes", [None] * count)
        return [{"dim": dim, "chunk": size} for dim, size in zip(keywords["dims"], sizes, strict=True)]

    def keywords(self, members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        keywords: dict[str, Any] = {"dims": [member["dim"] for member in members], **super().keywords(members)}
        if any("chunk" in member for member in members):
            keywords["sizes"] = [member.get("chunk") for member in members]
        return keywords


@_ReduceScatterBucket
def reduce_scatter_bucket(
    parts: Sequence[Tensor],
    *,
    dims: Sequence[int],
    axis: str,
    op: str = "sum",
    sizes: Sequence[int | None] | None = None,
) -> Started[tuple[Tensor, ...]]:
    """`reduce_scatter` of every tensor in `parts`, in one collective.

    Tensor i is split along `dims[i]`, into chunks of `sizes[i]` elements (None: even chunks). RankError unless all have
    one dtype, and dims and sizes match the tensors.
    """
    check_dtype(parts)
    check_op(op)
    context = current()
    n, chunk_sizes = context.size(axis), [None] * len(parts) if sizes is None else sizes
    if not len(parts) == len(dims) == len(chunk_sizes):
        raise RankError(
            f"a bucket of {len(parts)} tensors needs as many dims and sizes, not {len(dims)} and {len(chunk_sizes)}"
        )
    if n == 1:
        scattered = zip(parts, dims, chunk_sizes, strict=True)
        return done(tuple(reduce_scatter(part, dim=dim, axis=axis, op=op, chunk=size) for part, dim, size in scattered))
    stacked = [chunks(part, dim, n, size) for part, dim, size in zip(parts, dims, chunk_sizes, strict=True)]
    shapes = [one.shape[1:] for one in stacked]
    buffer = parts[0].new_empty(n, sum(map(math.prod, shapes)))
    start = 0
    for one, shape in zip(stacked, shapes, strict=True):
        buffer[:, start : start + math.prod(shape)].view(one.shape).copy_(one)
        start += math.prod(shape)
    return context.start(reduce_scatter_bucket, axis, buffer, lambda reduced: pieces(reduced, shapes), op)
