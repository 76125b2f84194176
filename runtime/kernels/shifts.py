"""Flipping and rolling along dims that the mesh splits evenly, each over one axis: every rank sends to one other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardc.runtime.collectives.permute import permute
from shardc.runtime.kernels.parts import Part, by_dim

__all__ = ["flip", "roll"]


def flip(x: Tensor, dims: Sequence[int], **parts: Part) -> Tensor:
    """`aten.flip`; this rank holds the given parts of some of the dims."""
    x = x.flip(tuple(dims))
    for part in parts.values():
        x = permute(x, axis=part.axes[0], sources=range(part.count)[::-1])
    return x


def roll(x: Tensor, shifts: int | Sequence[int], dims: int | Sequence[int], **parts: Part) -> Tensor:
    """`aten.roll` along `dims`; this rank holds the given parts of some of them."""
    held = by_dim(parts)
    pairs = zip(_listed(shifts), _listed(dims), strict=True)
    for by, dim in ((by, dim % x.dim()) for by, dim in pairs):
        x = _rolled(x, by, dim, held[dim]) if dim in held else x.roll(by, dim)
    return x


def pieces(by: int, size: int, count: int) -> list[tuple[int, int]]:
    """What a part of a dim that is rolled `by` elements is made of: `(distance, rows)` says how many parts before it
    they come from, in order. `size` elements are split into `count` parts."""
    chunk = size // count
    far, rows = divmod(by % size, chunk)
    found = [((far + 1) % count, rows), (far % count, chunk - rows)]
    return [(distance, rows) for distance, rows in found if rows]


def _rolled(x: Tensor, by: int, dim: int, part: Part) -> Tensor:
    """The last rows of one part, then the first rows of the part after it."""
    found = pieces(by, part.size, part.count)
    starts = [0] if len(found) == 1 else [found[1][1], 0]
    moved = [part.shifted(x.narrow(dim, at, rows), far) for at, (far, rows) in zip(starts, found, strict=True)]
    return torch.cat(moved, dim)


def _listed(value: int | Sequence[int]) -> Sequence[int]:
    return [value] if isinstance(value, int) else value
