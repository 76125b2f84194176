"""Buckets: several tensors of one dtype go through one collective, over a flat buffer that holds them in order.

Every element is reduced over the same ranks as without a bucket. The results are views of one buffer. Its memory is
free once nobody holds any of them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.collectives.c10d import Group
from shardc.runtime.collectives.collective import AnyCollective, Arguments, Collective, Held, Result, Sizes, Started
from shardc.runtime.errors import RankError

__all__: list[str] = []


class Bucket(Collective[Arguments, Result]):
    """Runs several calls of one collective, its members, as one call over a buffer.

    `single` gives the cost of that call. `members` gives the keywords that each member would have by itself.
    """

    of: AnyCollective
    """The collective of its members."""

    def __init__(self, begin: Callable[Arguments, Started[Result]]) -> None:
        super().__init__(begin)
        assert self.of.bucket is None, f"{self.of.name} has two buckets"
        self.of.bucket = self

    @property
    def single(self) -> AnyCollective:
        return self.of

    @abstractmethod
    def members(self, keywords: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
        """The keywords that each of `count` members would have by itself, without axis and reduction."""

    def keywords(self, members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The keywords of a bucket, from those of its members. All members have one axis and one reduction."""
        return {name: members[0][name] for name in ("axis", "op") if name in members[0]}

    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        return self.of.exchange(operands, position, op)

    def c10d(self, operand: Tensor, group: Group, op: str) -> Callable[[], Tensor]:
        return self.of.c10d(operand, group, op)

    def sent(self, ranks: int, size: float) -> float:
        return self.of.sent(ranks, size)

    def shape(self, shape: Sizes, ranks: int, keywords: Mapping[str, Any]) -> Sizes:
        return self.of.shape(shape, ranks, keywords)

    def padded(self, shape: Sizes, ranks: int, keywords: Mapping[str, Any]) -> Sizes:
        return self.of.padded(shape, ranks, keywords)

    def result_bytes(self, ranks: int, size: float) -> float:
        return self.of.result_bytes(ranks, size)

    def holds(self, keywords: Mapping[str, Any]) -> Held:
        return Held.NOTHING if self.of.works_on_copy else Held.COPY

    def workspace(self, keywords: Mapping[str, Any], operand: int, result: int, started: bool) -> int:
        return 0 if started and self.holds(keywords) is Held.COPY else operand


def check_dtype(parts: Sequence[Tensor]) -> None:
    """RankError unless all tensors have one dtype."""
    dtypes = {part.dtype for part in parts}
    if len(dtypes) != 1:
        names = ", ".join(sorted(map(str, dtypes))) or "none at all"
        raise RankError(f"a bucket holds tensors of one dtype, not {names}: use a bucket for each dtype")


def pieces(buffer: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """Views of the flat `buffer` with these shapes, one after another.

    (`torch.split` would not do: autograd forbids writing to its results.)
    """
    views: list[Tensor] = []
    start = 0
    for shape in shapes:
        views.append(buffer[start : start + math.prod(shape)].view(shape))
        start += math.prod(shape)
    return tuple(views)
