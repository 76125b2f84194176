"""Reduce-scatter: every rank gets its chunk of the reduction over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from shardc.runtime.collectives import c10d
from shardc.runtime.collectives.chunks import KeepsChunk, chunks
from shardc.runtime.collectives.collective import Arguments, Collective, Held, Result, Started, done
from shardc.runtime.collectives.reductions import check_op, reduced
from shardc.runtime.mesh.mesh import current
from shardc.runtime.mesh.orders import BLOCKS

__all__ = ["reduce_scatter"]


class _ReduceScatter(KeepsChunk, Collective[Arguments, Result]):
    """Transports take `(n, *chunk)` and return `chunk`."""

    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        return reduced([operand[position] for operand in operands], op)

    def c10d(self, operand: Tensor, group: c10d.Group, op: str) -> Callable[[], Tensor]:
        arrived = c10d.reduced(
            operand, group, op, lambda x, how: c10d.OPS.reduce_scatter_tensor(x, how, group.size, group.name)
        )
        return lambda: arrived().squeeze(0)

    def sent(self, ranks: int, size: float) -> float:
        return (ranks - 1) / ranks * size

    def holds(self, keywords: Mapping[str, Any]) -> Held:
        return Held.COPY if _rearranges(keywords) else Held.OPERAND

    def workspace(self, keywords: Mapping[str, Any], operand: int, result: int, started: bool) -> int:
        return operand if _rearranges(keywords) and not started else 0

    def sample(self, ranks: int, near: int = 1) -> dict[str, Any]:
        return {"dim": 0}


def _rearranges(keywords: Mapping[str, Any]) -> bool:
    """Whether the chunks do not lie one after the other in the operand."""
    return bool(keywords["dim"] or "order" in keywords)


@_ReduceScatter
def reduce_scatter(
    x: Tensor, *, dim: int, axis: str, op: str = "sum", chunk: int | None = None, order: str = BLOCKS
) -> Started[Tensor]:
    """The rank's chunk of the reduction over the ranks: `dim` shrinks n times, or to `chunk` elements with padding.

    RankError where `dim`, `axis`, `op` or `order` do not exist, or `dim` does not split evenly.
    """
    context = current()
    n = context.size(axis)
    check_op(op)
    if n == 1:
        return done(x.contiguous())
    return context.start(reduce_scatter, axis, chunks(x, dim, n, chunk, order), op=op)
