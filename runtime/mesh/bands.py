"""Which pairs of rows and columns count where a product is cut to a band, as attention's by causality and windows; and
the order in which a ring visits the parts of the columns.

    causal, 4 rows, 4 columns, 2 ranks     rows 0-1 x columns 0-1: 3 pairs    rows 0-1 x columns 2-3: none
                                           rows 2-3 x columns 0-1: 4 pairs    rows 2-3 x columns 2-3: 3 pairs

Row i and column j count where `j <= i`, if `causal`; and, where `window` is not 0, where `i - window < j`, and
`j < i + window` if not causal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from shardc.runtime.mesh.orders import FOLDED, extent, order_of, runs_of

Runs = tuple[tuple[int, int], ...]
"""The positions in one part of a dim: `(start, length)` of every run of consecutive ones."""


@lru_cache(maxsize=1 << 10)
def runs_of_parts(size: int, axes: tuple[str, ...], counts: tuple[int, ...], unit: int = 1) -> tuple[Runs, ...]:
    """The positions of every part of a dim of `size` that `axes` of `counts` ranks split, major to minor. An axis that
    folds the dim is the last one, and gives every part two runs."""
    folded = bool(axes) and order_of(axes[-1]) == FOLDED
    found: list[Runs] = []
    for place in itertools.product(*map(range, counts)):
        blocks = len(counts) - folded
        start, chunk, valid = extent(size, counts[:blocks], place[:blocks], unit)
        runs = runs_of(FOLDED, chunk // unit, counts[-1], place[-1]) if folded else [(0, valid // unit)]
        found.append(tuple([(start + first * unit, length * unit) for first, length in runs]))
    return tuple(found)


def pairs(rows: Runs, columns: Runs, causal: bool, window: int) -> int:
    """The number of pairs that count."""
    total = 0
    for (top, height), (left, width) in itertools.product(rows, columns):
        inside = _below(top - left, height, width, 0 if causal else window - 1) if causal or window else height * width
        total += inside - (_below(top - left, height, width, -window) if window else 0)
    return total


def _below(ahead: int, height: int, width: int, most: int) -> int:
    """The pairs of a block with `column - row <= most`; the first row is `ahead` positions after the first column."""
    first = ahead + most + 1  # columns that count in the first row, if it had as many
    return _triangle(first, height) - _triangle(first - width, height)


def _triangle(first: int, count: int) -> int:
    """`max(first, 0) + max(first + 1, 0) + ...`, `count` terms."""
    last = first + count - 1
    return (last * (last + 1) if last > 0 else 0) // 2 - (first * (first - 1) if first > 0 else 0) // 2


class Visit(NamedTuple):
    """One step of a ring: a rank at place p of the axes works on the columns of the part at `p - offset`.

    `pairs` is the number of pairs of the rank that has most.
    """

    offset: tuple[int, ...]
    pairs: int


@lru_cache(maxsize=1 << 10)
def visits(
    rows: tuple[Runs, ...], columns: tuple[Runs, ...], counts: tuple[int, ...], causal: bool, window: int
) -> tuple[Visit, ...]:
    """The steps of a ring over axes of `counts` ranks, which hold `rows` and, at first, `columns`.

    It goes round the last axis most often. The first step works on the rank's own columns; of the others, those are
    left out in which no rank has anything to do.
    """
    places = list(itertools.product(*map(range, counts)))
    number = {place: index for index, place in enumerate(places)}
    found: list[Visit] = []
    for offset in _round(counts):
        held = (number[shifted(place, offset, counts)] for place in places)
        most = max(pairs(rows[at], columns[part], causal, window) for at, part in enumerate(held))
        if most or not found:
            found.append(Visit(offset, most))
    return tuple(found)


def shifted(place: Sequence[int], offset: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
    """The place `offset` before `place`; the last follows the first."""
    return tuple([(p - o) % n for p, o, n in zip(place, offset, counts, strict=True)])


def _round(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every offset once, each one further along one axis than that before; along the last axis where it can be."""
    offset = [0] * len(counts)
    yield tuple(offset)
    for step in range(1, math.prod(counts)):
        axis = len(counts) - 1
        while step % math.prod(counts[axis:]) == 0:
            axis -= 1
        offset[axis] = (offset[axis] + 1) % counts[axis]
        yield tuple(offset)


def hop(offset: Sequence[int], following: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int]]:
    """How far columns go from one step to another: the number of each axis along which they go, and by how many."""
    ways = enumerate(zip(offset, following, counts, strict=True))
    return [(axis, (after - before) % count) for axis, (before, after, count) in ways if after != before]
