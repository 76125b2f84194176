"""The order in which a mesh axis deals out a dim: `cp` deals out blocks, `cp~folded` deals it out folded.

    8 elements on cp=2    cp           rank 0: 0 1 2 3    rank 1: 4 5 6 7
                          cp~folded    rank 0: 0 1 6 7    rank 1: 2 3 4 5

Folded, the dim is cut into 2n pieces, and rank i has pieces i and 2n-1-i. Under a causal mask, every rank then has as
much to compute as any other. 2n divides the size of such a dim, so that nothing is padded. Of several axes that split
it, only the last may fold, within the blocks of those before it.

Layouts, cuts and parts write an axis with its order. On a mesh, axes have bare names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCKS, FOLDED = "blocks", "folded"
ORDERS = (BLOCKS, FOLDED)


def axis_of(split: str) -> str:
    """The mesh axis of an axis with its order: `cp` of `cp~folded`."""
    return split.partition("~")[0]


def order_of(split: str) -> str:
    """The order of an axis with its order: `folded` of `cp~folded`, `blocks` of `cp`."""
    return split.partition("~")[2] or BLOCKS


def in_order(axis: str, order: str) -> str:
    """The mesh axis `axis` as it is written where it deals out in `order`."""
    return axis if order == BLOCKS else f"{axis}~{order}"


def extent(size: int, counts: Sequence[int], place: Sequence[int], unit: int = 1) -> tuple[int, int, int]:
    """Of a dim of `size` that axes of `counts` ranks split in blocks, major to minor, the part at `place`: where it
    starts, its length, which is that of every part, and how many elements of it are no padding. All are multiples of
    `unit`."""
    start, chunk, valid = 0, size // unit, size // unit
    for count, coordinate in zip(counts, place, strict=True):
        chunk = -(-chunk // count)
        first = coordinate * chunk
        start, valid = start + first, min(max(valid - first, 0), chunk)
    return start * unit, chunk * unit, valid * unit


def runs_of(order: str, size: int, ranks: int, place: int) -> list[tuple[int, int]]:
    """`(start, length)` of the runs of neighbours that the rank at `place` has of `size` elements, in local order.
    The dim divides evenly."""
    if order == BLOCKS:
        return [(place * (size // ranks), size // ranks)]
    piece = size // (2 * ranks)
    return [(place * piece, piece), ((2 * ranks - 1 - place) * piece, piece)]


def dealt(x: Tensor, dim: int, order: str, ranks: int, place: int) -> Tensor:
    """What the rank at `place` has of `dim` of the global `x`; a view where that is one run."""
    runs = [x.narrow(dim, *run) for run in runs_of(order, x.shape[dim], ranks, place)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim)


def merged(parts: Sequence[Tensor], dim: int, order: str) -> Tensor:
    """The global tensor from the parts of all ranks along `dim`; inverse of `dealt`."""
    if order == FOLDED:
        halves = [part.chunk(2, dim) for part in parts]
        parts = [*(first for first, _ in halves), *(second for _, second in reversed(halves))]
    return torch.cat(list(parts), dim)
