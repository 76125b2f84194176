"""Reorder: a dim that one axis deals out in blocks is dealt out folded, or the other way round; see `orders.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.collectives.c10d import OPS, Group, moved
from shardc.runtime.collectives.chunks import check_dim, check_order, joined
from shardc.runtime.collectives.collective import Arguments, Collective, Held, Result, Sizes, Started, done
from shardc.runtime.errors import RankError
from shardc.runtime.mesh.mesh import current
from shardc.runtime.mesh.orders import FOLDED, ORDERS

__all__ = ["reorder"]


def _pieces(ranks: int, place: int, folded: bool) -> tuple[int, int]:
    """The two pieces, of 2n, that a rank has."""
    return (place, 2 * ranks - 1 - place) if folded else (2 * place, 2 * place + 1)


def _owner(ranks: int, piece: int, folded: bool) -> int:
    """The rank that has a piece."""
    return min(piece, 2 * ranks - 1 - piece) if folded else piece // 2


class _Reorder(Collective[Arguments, Result]):
    """Transports take and return `(2, *piece)`: the rank's pieces in local order. `op` is the order of the result."""

    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        ranks, folded = len(operands), op == FOLDED
        rows: list[Tensor] = []
        for piece in _pieces(ranks, position, folded):
            owner = _owner(ranks, piece, not folded)
            rows.append(operands[owner][_pieces(ranks, owner, not folded).index(piece)])
        return torch.stack(rows)

    def c10d(self, operand: Tensor, group: Group, op: str) -> Callable[[], Tensor]:
        folded, ranks = op == FOLDED, group.size
        given, wanted = (_pieces(ranks, group.position, how) for how in (not folded, folded))
        targets = [_owner(ranks, piece, folded) for piece in given]
        origins = [_owner(ranks, piece, not folded) for piece in wanted]
        # rows go out by target and come in by origin; of two for one rank, the lower piece is first
        out = sorted(range(2), key=lambda row: (targets[row], given[row]))
        arriving = sorted(range(2), key=lambda row: (origins[row], wanted[row]))
        receives, sends = ([ranks_of.count(rank) for rank in range(ranks)] for ranks_of in (origins, targets))
        rows = operand if out == [0, 1] else operand.flip(0)
        arrived = moved(rows, group, lambda x: OPS.all_to_all_single(x, receives, sends, group.name))
        return lambda: arrived() if arriving == [0, 1] else arrived().flip(0)

    def sent(self, ranks: int, size: float) -> float:
        # the rank that sends most: with two ranks, each keeps one of its two pieces
        return size * {1: 0.0, 2: 0.5}.get(ranks, 1.0)

    def shape(self, shape: Sizes, ranks: int, keywords: Mapping[str, Any]) -> Sizes:
        return shape

    def holds(self, keywords: Mapping[str, Any]) -> Held:
        return Held.COPY

    def joins(self, keywords: Mapping[str, Any]) -> bool:
        return bool(keywords["dim"])

    def workspace(self, keywords: Mapping[str, Any], operand: int, result: int, started: bool) -> int:
        return 0 if started else result

    def orders(self, source: str, target: str) -> dict[str, str]:
        return {"order": target}

    def sample(self, ranks: int, near: int = 1) -> dict[str, Any]:
        return {"dim": 0, "order": FOLDED}


@_Reorder
def reorder(x: Tensor, *, dim: int, axis: str, order: str) -> Started[Tensor]:
    """The rank's part of `dim` where `axis` deals it out in `order`, from its part in the other order.

    RankError where `dim`, `axis` or `order` do not exist, or the rank's part does not divide into two pieces.
    """
    context = current()
    n = context.size(axis)
    check_dim(x, dim)
    if order not in ORDERS:
        check_order(x, dim, n, order)
    if x.shape[dim] % 2:
        raise RankError(f"dim {dim} of shape {tuple(x.shape)} does not divide into two pieces, so it cannot be folded")
    if n == 1:
        return done(x.contiguous())
    pieces = x.unflatten(dim, (2, x.shape[dim] // 2)).movedim(dim, 0)
    return context.start(reorder, axis, pieces, lambda rows: joined(rows, dim, None), order)
