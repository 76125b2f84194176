"""Permute: every rank sends its whole operand to one other. Bodies of operators use it; conversions do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from shardc.runtime.collectives.c10d import OPS, Group, moved
from shardc.runtime.collectives.collective import Arguments, Collective, Result, Sizes, Started, done
from shardc.runtime.errors import RankError
from shardc.runtime.mesh.mesh import current

__all__ = ["permute"]


class _Permute(Collective[Arguments, Result]):
    """With `op` "1 2 0", rank 0 gets the operand of rank 1, rank 1 that of rank 2, and rank 2 that of rank 0."""

    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        return operands[int(op.split()[position])].clone()

    def c10d(self, operand: Tensor, group: Group, op: str) -> Callable[[], Tensor]:
        sources = [int(source) for source in op.split()]
        source, target = sources[group.position], sources.index(group.position)
        receives, sends = ([int(rank == other) for rank in range(group.size)] for other in (source, target))
        arrived = moved(
            operand.unsqueeze(0), group, lambda rows: OPS.all_to_all_single(rows, receives, sends, group.name)
        )
        return lambda: arrived().squeeze(0)

    def sent(self, ranks: int, size: float) -> float:
        return size if ranks > 1 else 0.0

    def shape(self, shape: Sizes, ranks: int, keywords: Mapping[str, Any]) -> Sizes:
        return shape

    def sample(self, ranks: int, near: int = 1) -> dict[str, Any]:
        return {"sources": [(place + near) % ranks for place in range(ranks)]}


@_Permute
def permute(x: Tensor, *, axis: str, sources: Sequence[int]) -> Started[Tensor]:
    """The rank at coordinate i gets the operand of the rank at coordinate `sources[i]`.

    RankError unless `sources` has every coordinate of `axis` once.
    """
    context = current()
    n = context.size(axis)
    if sorted(sources) != list(range(n)):
        raise RankError(f"sources must be the {n} coordinates of axis {axis!r} in some order, not {list(sources)}")
    if n == 1:
        return done(x.contiguous())
    return context.start(permute, axis, x, op=" ".join(map(str, sources)))
