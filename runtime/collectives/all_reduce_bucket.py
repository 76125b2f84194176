"""Several all-reduces as one, over a flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.collectives import c10d
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.runtime.collectives.bucket import Bucket, check_dtype, pieces
from shardc.runtime.collectives.collective import Arguments, Result, Started, done
from shardc.runtime.collectives.reductions import check_op
from shardc.runtime.mesh.mesh import current

__all__ = ["all_reduce_bucket"]


class _AllReduceBucket(Bucket[Arguments, Result]):
    of = all_reduce
    works_on_copy = True  # the buffer, which becomes the result
    writes_operand = True

    def c10d(self, operand: Tensor, group: c10d.Group, op: str) -> Callable[[], Tensor]:
        return c10d.reduced(operand, group, op, lambda x, how: c10d.OPS.all_reduce_(x, how, group.name))

    def members(self, keywords: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
        return [{}] * count


@_AllReduceBucket
def all_reduce_bucket(parts: Sequence[Tensor], *, axis: str, op: str = "sum") -> Started[tuple[Tensor, ...]]:
    """`all_reduce` of every tensor in `parts`, in one collective. RankError unless all have one dtype."""
    check_dtype(parts)
    check_op(op)
    context = current()
    if context.size(axis) == 1:
        return done(tuple(all_reduce(part, axis=axis, op=op) for part in parts))
    shapes = [part.shape for part in parts]
    buffer = torch.cat([part.flatten() for part in parts])
    return context.start(all_reduce_bucket, axis, buffer, lambda reduced: pieces(reduced, shapes), op)
