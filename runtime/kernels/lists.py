"""Operators over all elements in order, or over all pairs of points, where the mesh splits a dim of the operand."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from shardc.runtime.kernels.parts import Part, by_dim

__all__ = ["hash_tensor", "nonzero_static", "pair_distances"]


def nonzero_static(x: Tensor, *, size: int, fill_value: int = -1, s: Part) -> Tensor:
    """`aten.nonzero_static` of `x`, whose dim 0 is split: this rank holds part `s` and returns its addend."""
    positions = x[: s.valid].nonzero()
    positions[:, 0] += s.start
    counts = s.gather(torch.tensor([len(positions)], device=x.device), 0).tolist()
    before = min(sum(counts[: s.index]), size)
    positions = positions[: size - before]
    result = torch.zeros(size, x.dim(), dtype=torch.int64, device=x.device)
    result[before : before + len(positions)] = positions
    if s.index == 0:
        result[sum(counts) :] = fill_value
    return result


def hash_tensor(x: Tensor, dim: Sequence[int] = (), *, keepdim: bool = False, mode: int = 0, **parts: Part) -> Tensor:
    """`aten.hash_tensor` over the dims `dim` (empty: all); this rank holds the given parts of the dims of `x`."""
    parts_by_dim = by_dim(parts)
    for at, part in parts_by_dim.items():
        x = part.fill(x, at, 0)
    dims = [d % x.dim() for d in dim] or list(range(x.dim()))
    hashes = torch.hash_tensor(x, dim=dims, keepdim=True, mode=mode).view(torch.int64)
    for at, part in parts_by_dim.items():
        hashes = functools.reduce(torch.bitwise_xor, part.gather(hashes, at).split(1, at))
    hashes = hashes.view(torch.uint64)
    return hashes if keepdim else hashes.squeeze(dims)


def pair_distances(x: Tensor, p: float = 2.0, *, d: Part) -> Tensor:
    """`aten._pdist_forward` of points; this rank holds part `d` of their coordinates."""
    local = torch.ops.aten._pdist_forward(d.fill(x, 1, 0).contiguous(), p)
    if p == float("inf"):
        return d.reduce(local, "max")
    return d.reduce(local) if p in (0, 1) else d.reduce(local**p) ** (1 / p)
