"""Which pairs of queries and keys attention computes: rectangles of them, with what a query sees in each.

    causal, 8 queries from 8 on, 16 keys       queries 0-7 see keys 0-7 all; queries 0-7 and keys 8-15 are a diagonal
    causal, window 4, the same, tiles of 16    queries 0-3 and keys 5-8, ... each with a mask of its positions

What no query sees is in no piece. A rank's queries or keys are one or more runs `(global start, length)`, side by side
in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

__all__: list[str] = []

Runs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Literals:
    """The numbers of a call of attention."""

    causal: bool
    scale: float
    window: int
    softcap: float
    dropout: float


class Sight(Enum):
    """What the queries of a piece see of its keys."""

    ALL = "all"
    DIAGONAL = "diagonal"
    """As many queries as keys: query i sees keys 0 to i."""
    BAND = "band"
    """What their positions say."""


@dataclass(frozen=True)
class Piece:
    """Queries and keys by their places in memory. `start` and `first` are the positions of the first query and key."""

    row: int
    rows: int
    column: int
    columns: int
    start: int
    first: int
    sight: Sight

    def queries(self, x: Tensor) -> Tensor:
        """The piece of `x`, which has a row for every query in its last dim but one."""
        return x[..., self.row : self.row + self.rows, :]

    def keys(self, x: Tensor) -> Tensor:
        """The piece of `x`, which has a row for every key in its last dim but one."""
        return x[..., self.column : self.column + self.columns, :]

    def sums(self, x: Tensor) -> Tensor:
        """The piece of `x`, which has a number for every query in its last dim."""
        return x[..., self.row : self.row + self.rows]

    def pairs(self, x: Tensor) -> Tensor:
        """The piece of `x`, whose last dims are queries and keys, or one."""
        x = self.queries(x) if x.shape[-2] != 1 else x
        return x[..., self.column : self.column + self.columns] if x.shape[-1] != 1 else x

    def seen(self, literals: Literals, device: torch.device) -> Tensor:
        """Whether each query sees each key, by their positions: `[rows, columns]`."""
        sees, ahead = torch.ones(self.rows, self.columns, dtype=torch.bool, device=device), self.start - self.first
        if literals.causal:
            sees = sees.tril_(ahead)
        if literals.window:
            sees = sees.triu_(ahead - literals.window + 1)
            sees = sees if literals.causal else sees.tril_(ahead + literals.window - 1)
        return sees


def rectangles(rows: Runs, columns: Runs, literals: Literals) -> list[Piece]:
    """Few large pieces: all that is seen whole, and the diagonals. Without a window."""
    found: list[Piece] = []
    for row, start, count in _placed(rows):
        for column, first, width in _placed(columns):
            if not literals.causal:
                found.append(Piece(row, count, column, width, start, first, Sight.ALL))
                continue
            before = min(max(start - first, 0), width)  # keys before the first query
            if before:
                found.append(Piece(row, count, column, before, start, first, Sight.ALL))
            skipped = max(first - start, 0)  # queries before the first key
            side = min(count - skipped, width - before)
            if side > 0:
                row, column, place = row + skipped, column + before, start + skipped
                found.append(Piece(row, side, column, side, place, place, Sight.DIAGONAL))
                rest = count - skipped - side
                if rest:
                    found.append(Piece(row + side, rest, column, side, place + side, place, Sight.ALL))
    return found


def tiles(rows: Runs, columns: Runs, literals: Literals, most: int, wide: int = 0) -> Iterator[Piece]:
    """Pieces of at most `most` pairs (but a row at least), row by row. With `wide`, only rows are cut, as if there were
    as many keys."""
    for row, start, count in _placed(rows):
        widest = max((width for _, width in columns), default=1)
        step = max(most // wide, 1) if wide else rows_of_tile(count, widest, literals, most)
        for offset in range(0, count, step):
            height = min(step, count - offset)
            for column, first, width in _placed(columns):
                low, high = _span(start + offset, height, literals)
                low, high = max(low - first, 0), min(high - first, width)
                across = max(high - low, 1) if wide else max(most // step, 1)
                for place in range(low, high, across):
                    size = min(across, high - place)
                    sight = _sight(height, size, start + offset - first - place, literals)
                    yield Piece(row + offset, height, column + place, size, start + offset, first + place, sight)


def _placed(runs: Runs) -> Iterator[tuple[int, int, int]]:
    """`(place in memory, global start, length)` of every run that is not empty."""
    place = 0
    for start, length in runs:
        if length > 0:
            yield place, start, length
        place += length


def rows_of_tile(rows: int, columns: int, literals: Literals, most: int) -> int:
    """Rows of a tile. With a window they are so few that a tile and its window have `most` pairs."""
    if not literals.window:
        return max(min(rows, max(math.isqrt(most), most // max(columns, 1))), 1)
    window = literals.window if literals.causal else 2 * literals.window
    return max(min(rows, (math.isqrt(window * window + 4 * most) - window) // 2, max(window, 64)), 1)


def _span(start: int, count: int, literals: Literals) -> tuple[int, int]:
    """The positions that some of `count` queries from `start` on see, from the first to behind the last."""
    far = 1 << 62
    low = start - literals.window + 1 if literals.window else -far
    high = start + count if literals.causal else start + count - 1 + literals.window if literals.window else far
    return low, high


def _sight(rows: int, columns: int, ahead: int, literals: Literals) -> Sight:
    after = not literals.causal or columns - 1 <= ahead
    near = not literals.window or ahead + rows - 1 < literals.window
    back = literals.causal or not literals.window or columns - 1 - ahead < literals.window
    return Sight.ALL if after and near and back else Sight.BAND
