"""Dropout inside attention: which weights stay, tile by tile, from what the random stream gave once.

Eager mode draws one Bernoulli number for every score `[batch, kv_heads, group, q_length, length]`. Given a state of the
generator, a rank draws the same for the rows of its own queries, with the keys of all ranks (`StreamDropping`). Given a
seed, it draws for each tile anew, from the seed and the place of the tile (`SeededDropping`): forward and backward then
drop the same only where they split scores alike. Never more than a block of numbers is in memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from shardc.runtime.kernels.attention.kernels import KEEP, Drop
from shardc.runtime.kernels.attention.pieces import Piece
from shardc.runtime.kernels.bernoulli import kind
from shardc.runtime.kernels.parts import Part
from shardc.runtime.kernels.streams import SEED, mixed, number_of

__all__: list[str] = []


Head = tuple[int, int, int]
"""One of the rank's own heads: its place in the batch, among the heads of keys, and in the group."""


class Dropping(Protocol):
    """Which weights of a rank are dropped, with probability `dropout`."""

    dropout: float

    @property
    def heads(self) -> Iterator[Head] | None:
        """The order in which heads are drawn, one at a time; None where all are drawn at once."""
        ...

    @property
    def width(self) -> int:
        """How many keys a tile has, whatever is computed of them; 0 where a tile has those that are computed."""
        ...

    def drop(self, weights: Tensor, first: Head, piece: Piece) -> Tensor:
        """`weights` of a piece (in its last dims), from the head `first` on, with dropped ones zero and the others
        scaled, in place."""
        ...


def dropping_from(
    draw: Tensor, dropout: float, dtype: torch.dtype, shape: Sequence[int], parts: Sequence[Part | None]
) -> Dropping:
    """What drops the weights of a rank, which has `parts` of batch, heads and group. `shape` is that of the scores of
    all ranks, `dtype` the type in which eager mode draws; `draw` is a state of the generator, or a seed."""
    if draw.numel() == SEED:
        return SeededDropping(number_of(draw), dropout, [part.index if part else 0 for part in parts])
    return StreamDropping(draw, dropout, dtype, shape, parts)


def drop_of(dropping: Dropping | None, piece: Piece) -> Drop:
    """What a kernel that draws for itself is to drop of a piece."""
    return Drop(dropping.dropout, dropping.seed_of(piece)) if isinstance(dropping, SeededDropping) else KEEP


class SeededDropping(Dropping):
    """Dropout that is drawn piece by piece from a seed, by the rank that has the parts `places` of batch, heads and
    group."""

    def __init__(self, seed: int, dropout: float, places: Sequence[int]) -> None:
        self.dropout, self._seed, self._places = dropout, seed, tuple(places)
        self._drawn: tuple[Piece, Tensor] | None = None

    @property
    def heads(self) -> None:
        return None

    @property
    def width(self) -> int:
        return 0

    def seed_of(self, piece: Piece) -> int:
        """What a piece is drawn from: the same in forward and backward, and on ranks that compute the same."""
        return mixed(self._seed, *self._places, piece.start, piece.first)

    def drop(self, weights: Tensor, first: Head, piece: Piece) -> Tensor:
        if self._drawn is None or self._drawn[0] != piece:
            self._drawn = None  # before the next is made
            generator = torch.Generator(weights.device).manual_seed(self.seed_of(piece))
            kept = torch.empty(weights.shape, dtype=torch.bool, device=weights.device)
            self._drawn = piece, kept.bernoulli_(1 - self.dropout, generator=generator)
        return weights.mul_(self._drawn[1]).mul_(1 / (1 - self.dropout))


class StreamDropping(Dropping):
    """Dropout of the weights of a rank: of the heads in `parts` (of batch, heads and group), the queries at `rows` and
    the keys at `columns`. `shape` is that of the scores of all ranks, `dtype` the type in which eager mode draws."""

    def __init__(
        self, draw: Tensor, dropout: float, dtype: torch.dtype, shape: Sequence[int], parts: Sequence[Part | None]
    ) -> None:
        self.shape, self.dropout = tuple(shape), dropout
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
    def heads(self) -> Iterator[Head]:
        """The rank's own heads, without padding, in the order of the stream."""
        batch, heads, group = (range(count) for count in self._counts)
        return itertools.product(batch, heads, group)

    def drop(self, weights: Tensor, first: Head, piece: Piece) -> Tensor:
        place = 0
        for size, index, start in zip(self.shape, (*first, piece.start), [*self._starts, 0], strict=False):
            place = place * size + index + start
        if self._rows != (place, piece.rows):
            kept = self._numbers.take(place * self.width, piece.rows * self.width)
            self._rows, self._kept = (place, piece.rows), kept.view(piece.rows, self.width).to(weights.device)
        return weights.mul_(self._kept[:, piece.first : piece.first + piece.columns]).mul_(1 / (1 - self.dropout))
