"""Cutting a tensor into n chunks along one dim, and putting chunks side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.errors import RankError
from shardc.runtime.execute.slots import padded

__all__: list[str] = []


def check_dim(x: Tensor, dim: int) -> None:
    """RankError for a dim that `x` lacks."""
    if not 0 <= dim < x.dim():
        raise RankError(f"a tensor of shape {tuple(x.shape)} has no dim {dim}")


def chunks(x: Tensor, dim: int, n: int, chunk: int | None) -> Tensor:
    """`(n, *chunk)`: the n chunks of `dim`, stacked.

    Chunks are even, or have `chunk` elements, the last ones padded with zeros. RankError if even ones do not exist.
    """
    check_dim(x, dim)
    if chunk is not None:
        x = padded(x, dim, n * chunk)
    if x.shape[dim] % n:
        raise RankError(
            f"dim {dim} of shape {tuple(x.shape)} does not split evenly into {n} chunks: give the size of a chunk"
        )
    return x.unflatten(dim, (n, x.shape[dim] // n)).movedim(dim, 0)


def joined(parts: Tensor, dim: int, size: int | None) -> Tensor:
    """The chunks of `(n, *chunk)` side by side along `dim`, up to `size`."""
    whole = parts.flatten(0, 1) if dim == 0 else torch.cat(parts.unbind(0), dim)
    return whole if size is None else whole.narrow(dim, 0, size).contiguous()


def resized(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    """The shape with another size of `dim`."""
    return (*shape[:dim], size, *shape[dim + 1 :])


class KeepsChunk:
    """The sizes of a collective whose result is the rank's chunk along `dim`."""

    def shape(self, shape: tuple[int, ...], ranks: int, keywords: Mapping[str, Any]) -> tuple[int, ...]:
        dim, chunk = keywords["dim"], keywords.get("chunk")
        return resized(shape, dim, shape[dim] // ranks if chunk is None else chunk)

    def padded(self, shape: tuple[int, ...], ranks: int, keywords: Mapping[str, Any]) -> tuple[int, ...]:
        chunk = keywords.get("chunk")
        return shape if chunk is None else resized(shape, keywords["dim"], chunk * ranks)

    def result_bytes(self, ranks: int, size: float) -> float:
        return size / ranks
