"""What is made of all elements in their order, or of all pairs of points, where the mesh splits a dim of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from shardc.runtime.kernels.parts import Part, by_dim

__all__ = ["hash_tensor", "nonzero_static", "pair_distances"]


def nonzero_static(x: Tensor, *, size: int, fill_value: int = -1, s: Part) -> Tensor:
    """`aten.nonzero_static` of a tensor of whose first dim this rank holds part `s`: its addend of the result."""
    own = x[: s.valid].nonzero()
    own[:, 0] += s.start
    counts = s.gather(torch.tensor([len(own)], device=x.device), 0).tolist()
    before = min(sum(counts[: s.index]), size)
    own = own[: size - before]
    result = torch.zeros(size, x.dim(), dtype=torch.int64, device=x.device)
    result[before : before + len(own)] = own
    if s.index == 0:
        result[sum(counts) :] = fill_value
    return result


def hash_tensor(x: Tensor, dim: Sequence[int] = (), *, keepdim: bool = False, mode: int = 0, **parts: Part) -> Tensor:
    """`aten.hash_tensor` over `dim` (all where it is empty), of whose dims this rank holds the given parts."""
    held = by_dim(parts)
    for at, part in held.items():
        x = part.fill(x, at, 0)
    dims = [d % x.dim() for d in dim] or list(range(x.dim()))
    found = torch.hash_tensor(x, dim=dims, keepdim=True, mode=mode).view(torch.int64)
    for at, part in held.items():
        found = functools.reduce(torch.bitwise_xor, part.gather(found, at).split(1, at))
    found = found.view(torch.uint64)
    return found if keepdim else found.squeeze(dims)


def pair_distances(x: Tensor, p: float = 2.0, *, d: Part) -> Tensor:
    """`aten._pdist_forward` of points of whose coordinates this rank holds part `d`."""
    own = torch.ops.aten._pdist_forward(d.fill(x, 1, 0).contiguous(), p)
    if p == float("inf"):
        return d.reduce(own, "max")
    return d.reduce(own) if p in (0, 1) else d.reduce(own**p) ** (1 / p)
