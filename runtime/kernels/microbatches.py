"""What a micro-batch has of values that do not depend on the batch. Micro-batches run one after another, as ranks of an
axis `time` would run side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from shardc.runtime.mesh.mesh import TIME, current

__all__ = ["addend_of_microbatch", "part_of_microbatch"]


def part_of_microbatch(x: Tensor, *, dim: int, count: int) -> Tensor:
    """The part of `dim` that the micro-batch under way has, of `count` equal ones. A copy: a view would keep all of
    `x`."""
    size = x.shape[dim] // count
    part = x.narrow(dim, current().coordinates[TIME] * size, size)
    return part.clone(memory_format=torch.contiguous_format)


def addend_of_microbatch(x: Tensor) -> Tensor:
    """`x` in the first micro-batch and zeros in the others, so that all of them add up to `x`."""
    return x if current().coordinates[TIME] == 0 else torch.zeros_like(x)
