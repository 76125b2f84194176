"""Flipping and rolling along dims that the mesh splits evenly, each over one axis: a rank sends to one other rank."""

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
    parts_by_dim = by_dim(parts)
    pairs = zip(_listed(shifts), _listed(dims), strict=True)
    for by, dim in ((by, dim % x.dim()) for by, dim in pairs):
        x = _rolled(x, by, dim, parts_by_dim[dim]) if dim in parts_by_dim else x.roll(by, dim)
    return x


def pieces(by: int, size: int, count: int) -> list[tuple[int, int]]:
    """The pieces of a part after a dim of `size` elements in `count` parts was rolled `by` elements.

    `(distance, rows)`: these rows come from the part `distance` parts before. Rolling 8 elements in 2 parts by 1 gives
    `[(1, 1), (0, 3)]`. The pieces are in order; empty ones are left out.
    """
    chunk = size // count
    far, rows = divmod(by % size, chunk)
    both = [((far + 1) % count, rows), (far % count, chunk - rows)]
    return [(distance, rows) for distance, rows in both if rows]


def _rolled(x: Tensor, by: int, dim: int, part: Part) -> Tensor:
    """The part after rolling: the last rows of one part, then the first rows of the part after it."""
    origins = pieces(by, part.size, part.count)
    starts = [0] if len(origins) == 1 else [origins[1][1], 0]
    moved = [part.shifted(x.narrow(dim, at, rows), far) for at, (far, rows) in zip(starts, origins, strict=True)]
    return torch.cat(moved, dim)


def _listed(value: int | Sequence[int]) -> Sequence[int]:
    return [value] if isinstance(value, int) else value
