"""Dropout inside attention: which weights stay, row by row, from what the random stream gave once.

Eager mode draws one Bernoulli number for every score `[batch, kv_heads, group, q_length, length]`. A rank draws the
rows of its own queries, with the keys of all ranks, and never more than a block of them is in memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardc.runtime.kernels.attention.pieces import Piece
from shardc.runtime.kernels.bernoulli import kind
from shardc.runtime.kernels.parts import Part

__all__: list[str] = []


class Dropping:
    """Dropout of the weights of a rank: of the heads in `parts` (of batch, heads and group), the queries at `rows` and
    the keys at `columns`. `shape` is that of the scores of all ranks, `dtype` the type in which eager mode draws."""

    def __init__(
        self, draw: Tensor, dropout: float, dtype: torch.dtype, shape: Sequence[int], parts: Sequence[Part | None]
    ) -> None:
        self.shape, self.dropout, self.device = tuple(shape), dropout, draw.device
        self._numbers = kind()(draw.cpu(), 1 - dropout, dtype, math.prod(shape))
        self._starts = [part.start if part else 0 for part in parts]
        self._counts = [part.valid if part else n for part, n in zip(parts, shape, strict=False)]
        self._rows: tuple[int, int] | None = None
        self._kept = torch.empty(0)

    @property
    def width(self) -> int:
        """How many keys a row has."""
        return max(self.shape[-1], 1)

    @property
    def heads(self) -> Iterator[tuple[int, int, int]]:
        """The rank's own heads, without padding, in the order of the stream."""
        batch, heads, group = (range(count) for count in self._counts)
        return itertools.product(batch, heads, group)

    def drop(self, weights: Tensor, batch: int, head: int, member: int, piece: Piece) -> Tensor:
        """`weights` of a piece (in its last dims) with dropped ones zero and the others scaled, in place."""
        place = 0
        for size, index, start in zip(self.shape, (batch, head, member, piece.start), [*self._starts, 0], strict=False):
            place = place * size + index + start
        if self._rows != (place, piece.rows):
            kept = self._numbers.take(place * self.width, piece.rows * self.width)
            self._rows, self._kept = (place, piece.rows), kept.view(piece.rows, self.width).to(self.device)
        return weights.mul_(self._kept[:, piece.first : piece.first + piece.columns]).mul_(1 / (1 - self.dropout))
