"""To partial: a tensor that is whole on every rank becomes addends of itself. Local: nothing is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.collectives.collective import Arguments, Local, Result, Sizes, Started, done
from shardc.runtime.collectives.reductions import check_op
from shardc.runtime.mesh.mesh import current

__all__ = ["to_partial"]


class _ToPartial(Local[Arguments, Result]):
    def shape(self, shape: Sizes, ranks: int, keywords: Mapping[str, Any]) -> Sizes:
        return shape


@_ToPartial
def to_partial(x: Tensor, *, axis: str, op: str = "sum") -> Started[Tensor]:
    """Addends of `x`, which is whole on every rank: an all-reduce with `op` would bring `x` back. Local.

    sum and prod: `x` on the first rank, the identity on the others. max and min: `x` on every rank. RankError where
    `axis` or `op` do not exist.
    """
    context = current()
    context.size(axis)
    check_op(op)
    if op in ("max", "min") or context.coordinates[axis] == 0:
        return done(x.contiguous())
    fill = torch.zeros_like if op == "sum" else torch.ones_like
    return done(fill(x, memory_format=torch.contiguous_format))
