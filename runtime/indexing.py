"""Indices into a dim that is split: rebased to the own chunk, with one dummy row that takes all the others."""

from __future__ import annotations

import torch
from torch import Tensor

from shardc.runtime.errors import RankError
from shardc.runtime.mesh import current


def rebase(indices: Tensor, *, axes: tuple[str, ...], size: int) -> Tensor:
    """Indices into a global dim → indices into the own chunk of `size` rows; those outside become `size`, the dummy.

    `axes` split the dim, major to minor. Negative indices (an `ignore_index`) are outside on every rank.
    """
    context = current()
    chunk = 0
    for axis in axes:
        chunk = chunk * context.size(axis) + context.coordinates[axis]
    local = indices - chunk * size
    return torch.where((local >= 0) & (local < size), local, size)


def pad_dummy(x: Tensor, *, dim: int) -> Tensor:
    """`x` with one row of zeros appended to `dim`: the row that `rebase` sends foreign indices to."""
    shape = list(x.shape)
    shape[dim] = 1
    return torch.cat([x, x.new_zeros(shape)], dim)


def drop_dummy(x: Tensor, *, dim: int) -> Tensor:
    """`x` without the last row of `dim`, contiguous. RankError if `dim` is empty."""
    if x.shape[dim] == 0:
        raise RankError(f"dim {dim} of shape {tuple(x.shape)} has no dummy row to drop")
    return x.narrow(dim, 0, x.shape[dim] - 1).contiguous()
