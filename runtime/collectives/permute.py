"""Permute: every rank sends all it has to one other. The bodies of operators use it; no conversion needs it."""

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
    """Transports give the operand of the rank whose position `op` names at the own one, as in "1 2 0"."""

    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        return operands[int(op.split()[position])].clone()

    def c10d(self, operand: Tensor, group: Group, op: str) -> Callable[[], Tensor]:
        sources = [int(source) for source in op.split()]
        wanted, reader = sources[group.position], sources.index(group.position)
        taken, given = ([int(rank == at) for rank in range(group.size)] for at in (wanted, reader))
        arrived = moved(operand.unsqueeze(0), group, lambda rows: OPS.all_to_all_single(rows, taken, given, group.name))
        return lambda: arrived().squeeze(0)

    def sent(self, ways: int, size: float) -> float:
        return size if ways > 1 else 0.0

    def shape(self, shape: Sizes, ways: int, told: Mapping[str, Any]) -> Sizes:
        return shape

    def sample(self, ways: int, near: int = 1) -> dict[str, Any]:
        return {"sources": [(place + near) % ways for place in range(ways)]}


@_Permute
def permute(x: Tensor, *, axis: str, sources: Sequence[int]) -> Started[Tensor]:
    """The operand of the rank whose coordinate is `sources[own coordinate]`; `sources` has every coordinate once."""
    context = current()
    n = context.size(axis)
    if sorted(sources) != list(range(n)):
        raise RankError(f"sources {list(sources)} are not the {n} coordinates of axis {axis!r} in some order")
    if n == 1:
        return done(x.contiguous())
    return context.start(permute, axis, x, op=" ".join(map(str, sources)))
