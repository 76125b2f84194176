"""Indices into a split dim: rebased to the rank's chunk, with one dummy row for all indices into other chunks. And
masks for the padding of dims that do not split evenly."""

from __future__ import annotations

import torch
from torch import Tensor

from shardc.runtime.errors import RankError
from shardc.runtime.kernels.parts import Part

__all__ = ["drop_dummy", "fill", "pad_dummy", "rebase"]

aten = torch.ops.aten


def rebase(indices: Tensor, *, part: Part, wrap: bool = False) -> Tensor:
    """Indices into a global dim → indices into the rank's part of it.

    Indices into other parts become the part's length, which is the dummy row. With `wrap`, negative indices count from
    the end. An index outside of the global dim raises RuntimeError, as on a single device: no rank would have the row,
    and it would read as zeros.
    """
    inside = (indices >= (-part.size if wrap else 0)) & (indices < part.size)
    aten._assert_async.msg(inside.all(), f"index out of range: the dim has {part.size} elements")
    local = (torch.where(indices < 0, indices + part.size, indices) if wrap else indices) - part.start
    return torch.where((local >= 0) & (local < part.valid), local, part.length)


def fill(x: Tensor, *, dim: int, part: Part, value: float, outer: int = 1) -> Tensor:
    """`x` with `value` in the padding of `part`, where `dim` is `(outer, part, rest)`, major to minor."""
    if outer == 1 and x.shape[dim] == part.length:
        return part.fill(x, dim, value)
    blocks = x.unflatten(dim, (outer, part.length, x.shape[dim] // outer // part.length))
    return part.fill(blocks, dim + 1, value).flatten(dim, dim + 2)


def pad_dummy(x: Tensor, *, dim: int) -> Tensor:
    """`x` with one row of zeros appended to `dim`: the dummy row of `rebase`."""
    shape = list(x.shape)
    shape[dim] = 1
    return torch.cat([x, x.new_zeros(shape)], dim)


def drop_dummy(x: Tensor, *, dim: int) -> Tensor:
    """`x` without the last row of `dim`, contiguous. RankError if `dim` is empty."""
    if x.shape[dim] == 0:
        raise RankError(f"dim {dim} of shape {tuple(x.shape)} has no dummy row to drop")
    return x.narrow(dim, 0, x.shape[dim] - 1).contiguous()
