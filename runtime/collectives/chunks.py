"""Cutting a tensor into n chunks along one dim, and putting chunks side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.errors import RankError
from shardc.runtime.execute.slots import padded
from shardc.runtime.mesh.orders import BLOCKS, FOLDED, ORDERS, dealt, merged

__all__: list[str] = []


def check_dim(x: Tensor, dim: int) -> None:
    """RankError for a dim that `x` lacks."""
    if not 0 <= dim < x.dim():
        raise RankError(f"a tensor of shape {tuple(x.shape)} has no dim {dim}")


def chunks(x: Tensor, dim: int, n: int, chunk: int | None, order: str = BLOCKS) -> Tensor:
    """`(n, *chunk)`: what each of n ranks has of `dim`, stacked.

    Chunks are even, or have `chunk` elements, the last ones padded with zeros. RankError if even ones do not exist.
    """
    check_dim(x, dim)
    check_order(x, dim, n, order)
    if order != BLOCKS:
        return torch.stack([dealt(x, dim, order, n, place) for place in range(n)])
    if chunk is not None:
        x = padded(x, dim, n * chunk)
    if x.shape[dim] % n:
        raise RankError(
            f"dim {dim} of shape {tuple(x.shape)} does not split evenly into {n} chunks: give the size of a chunk"
        )
    return x.unflatten(dim, (n, x.shape[dim] // n)).movedim(dim, 0)


def joined(parts: Tensor, dim: int, size: int | None, order: str = BLOCKS) -> Tensor:
    """The chunks of `(n, *chunk)` along `dim`, in their global order, up to `size`."""
    plain = dim == 0 and order == BLOCKS
    whole = parts.flatten(0, 1) if plain else merged(parts.unbind(0), dim, order)
    return whole if size is None else whole.narrow(dim, 0, size).contiguous()


def check_order(x: Tensor, dim: int, n: int, order: str) -> None:
    """RankError for an order that does not exist, or in which `dim` of `x` does not divide."""
    if order not in ORDERS:
        raise RankError(f"no order is called {order!r}: an axis deals out a dim in {' or '.join(ORDERS)}")
    if order == FOLDED and x.shape[dim] % (2 * n):
        raise RankError(f"dim {dim} of shape {tuple(x.shape)} does not fold over {n} ranks: {2 * n} must divide it")


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
