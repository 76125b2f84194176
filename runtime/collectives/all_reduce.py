"""All-reduce: every rank gets the whole reduction over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from shardc.runtime.collectives import c10d
from shardc.runtime.collectives.collective import Arguments, Collective, Result, Sizes, Started, done
from shardc.runtime.collectives.reductions import check_op, reduced
from shardc.runtime.mesh.mesh import current

__all__ = ["all_reduce"]


class _AllReduce(Collective[Arguments, Result]):
    """Transports keep the shape."""

    works_on_copy = True

    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        return reduced(operands, op)

    def c10d(self, operand: Tensor, group: c10d.Group, op: str) -> Callable[[], Tensor]:
        return c10d.reduced(operand, group, op, lambda x, how: c10d.OPS.all_reduce(x, how, group.name))

    def sent(self, ranks: int, size: float) -> float:
        return 2 * (ranks - 1) / ranks * size

    def shape(self, shape: Sizes, ranks: int, keywords: Mapping[str, Any]) -> Sizes:
        return shape


@_AllReduce
def all_reduce(x: Tensor, *, axis: str, op: str = "sum") -> Started[Tensor]:
    """The reduction over the ranks by `op`, whole on every rank; the shape stays.

    RankError where the mesh has no such axis, or `op` is none of sum, max, min, prod.
    """
    context = current()
    check_op(op)
    if context.size(axis) == 1:
        return done(x.contiguous())
    return context.start(all_reduce, axis, x, op=op)
