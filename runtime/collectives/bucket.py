"""Buckets: several tensors of one dtype go through one collective, over a flat buffer that holds one after another.

Every element is reduced over the same ranks as by a collective of its own. What comes back are pieces of one buffer:
its memory is free when nobody holds any of them.
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
    """Runs several collectives of one kind as one, over a buffer. What it costs, `single` tells; what is asked about
    one of its members takes the keywords that `members` tells."""

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
    def members(self, told: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
        """The keywords that each of `count` members would have by itself, axis and reduction apart."""

    def keywords(self, members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The keywords of a bucket whose members would have had these; they agree on axis and reduction."""
        return {name: members[0][name] for name in ("axis", "op") if name in members[0]}

    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        return self.of.exchange(operands, position, op)

    def c10d(self, operand: Tensor, group: Group, op: str) -> Callable[[], Tensor]:
        return self.of.c10d(operand, group, op)

    def sent(self, ways: int, size: float) -> float:
        return self.of.sent(ways, size)

    def shape(self, shape: Sizes, ways: int, told: Mapping[str, Any]) -> Sizes:
        return self.of.shape(shape, ways, told)

    def padded(self, shape: Sizes, ways: int, told: Mapping[str, Any]) -> Sizes:
        return self.of.padded(shape, ways, told)

    def result_bytes(self, ways: int, size: float) -> float:
        return self.of.result_bytes(ways, size)

    def holds(self, told: Mapping[str, Any]) -> Held:
        return Held.NOTHING if self.of.works_on_copy else Held.COPY

    def workspace(self, told: Mapping[str, Any], operand: int, result: int, started: bool) -> int:
        return 0 if started and self.holds(told) is Held.COPY else operand


def check_dtype(parts: Sequence[Tensor]) -> None:
    """RankError unless all tensors have one dtype."""
    dtypes = {part.dtype for part in parts}
    if len(dtypes) != 1:
        names = ", ".join(sorted(map(str, dtypes))) or "none at all"
        raise RankError(f"a bucket holds tensors of one dtype, not {names}")


def pieces(buffer: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """Views of the buffer, one after another. (Not by `split`, whose results may not be written to.)"""
    views: list[Tensor] = []
    start = 0
    for shape in shapes:
        views.append(buffer[start : start + math.prod(shape)].view(shape))
        start += math.prod(shape)
    return tuple(views)
