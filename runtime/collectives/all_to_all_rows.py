"""All-to-all of rows: every rank sends as many rows to each other as it says. Bodies of operators use it; conversions
do not.

    rank 0 sends [1, 2] rows:  a | b c          rank 0 gets  a d e
    rank 1 sends [2, 0] rows:  d e |            rank 1 gets  b c
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.collectives.all_to_all import all_to_all
from shardc.runtime.collectives.c10d import OPS, Group, moved
from shardc.runtime.collectives.collective import AnyCollective, Arguments, Collective, Result, Sizes, Started, done
from shardc.runtime.errors import RankError
from shardc.runtime.mesh.mesh import current

__all__ = ["all_to_all_rows"]


class _AllToAllRows(Collective[Arguments, Result]):
    """With `op` "1 2, 1 2" this rank sends one row to rank 0 and two to rank 1, and gets as many."""

    uneven = True

    @property
    def single(self) -> AnyCollective:
        return all_to_all

    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        parts: list[Tensor] = []
        for operand, counts in zip(operands, op.split(";"), strict=True):
            sent = _counts(counts)[0]
            start = sum(sent[:position])
            parts.append(operand[start : start + sent[position]])
        return torch.cat(parts)

    def c10d(self, operand: Tensor, group: Group, op: str) -> Callable[[], Tensor]:
        sent, received = _counts(op)
        return moved(operand, group, lambda rows: OPS.all_to_all_single(rows, received, sent, group.name))

    def sent(self, ranks: int, size: float) -> float:
        return (ranks - 1) / ranks * size

    def counted(self, ranks: int, position: int, operand: Tensor, op: str) -> float:
        sent = _counts(op)[0]
        return (sum(sent) - sent[position]) * (operand[:1].numel() * operand.element_size())

    def shape(self, shape: Sizes, ranks: int, keywords: Mapping[str, Any]) -> Sizes:
        return (sum(keywords["received"]), *shape[1:])


def _counts(op: str) -> tuple[list[int], list[int]]:
    sent, received = op.split(",")
    return [int(count) for count in sent.split()], [int(count) for count in received.split()]


@_AllToAllRows
def all_to_all_rows(x: Tensor, *, axis: str, sent: Sequence[int], received: Sequence[int]) -> Started[Tensor]:
    """The rows that the ranks of `axis` send to this one, in the order of the ranks.

    `x` has the rows for rank 0 first, then those for rank 1, ...; `sent` and `received` say how many. RankError where
    they do not count the ranks, or `sent` not the rows.
    """
    context = current()
    n = context.size(axis)
    if len(sent) != n or len(received) != n or sum(sent) != x.shape[0]:
        raise RankError(
            f"all_to_all_rows over {axis!r} ({n} ranks): it has {x.shape[0]} rows, is to send {list(sent)} and to "
            f"receive {list(received)}"
        )
    if n == 1:
        return done(x.contiguous())
    op = f"{' '.join(map(str, sent))},{' '.join(map(str, received))}"
    return context.start(all_to_all_rows, axis, x, op=op)
