"""Operators that cut or join a dim in equal blocks, as views: the dim becomes blocks x rest.

The operator then works on the blocks, and the rest splits freely, as in the halves of a gated layer or a fused qkv.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from shardc.ir.program import value_of
from shardc.rules.rewrites.builder import Builder

aten = torch.ops.aten


def _shape(x: fx.Node) -> list[int]:
    return [int(n) for n in value_of(x).shape]


def _blocks(b: Builder, x: fx.Node, dim: int, block: int) -> fx.Node:
    """`x` with `dim` seen as blocks of `block` elements."""
    shape = _shape(x)
    return b(aten.view.default, x, [*shape[:dim], shape[dim] // block, block, *shape[dim + 1 :]])


def slice_(b: Builder, x: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> fx.Node | None:
    shape = _shape(x)
    dim %= len(shape)
    first, last, _ = slice(start, end, step).indices(shape[dim])
    if not _aligned(first, last, step, shape[dim]):
        return None
    return b(aten.select.int, _blocks(b, x, dim, last - first), dim, first // (last - first))


def slice_backward(
    b: Builder, grad: fx.Node, sizes: Sequence[int], dim: int, start: Any, end: Any, step: int
) -> fx.Node | None:
    whole = [int(n) for n in sizes]
    dim %= len(whole)
    first, last, _ = slice(start, end, step).indices(whole[dim])
    if not _aligned(first, last, step, whole[dim]):
        return None
    block = last - first
    split = [*whole[:dim], whole[dim] // block, block, *whole[dim + 1 :]]
    return b(aten.view.default, b(aten.select_backward.default, grad, split, dim, first // block), whole)


def _aligned(first: int, last: int, step: int, size: int) -> bool:
    block = last - first
    return step == 1 and 1 < block < size and size % block == 0 and first % block == 0


def split(b: Builder, x: fx.Node, size: int, dim: int = 0) -> list[fx.Node] | None:
    total = _shape(x)[dim]
    return split_with_sizes(b, x, [size] * (total // size), dim) if size and total % size == 0 else None


def split_with_sizes(b: Builder, x: fx.Node, sizes: Sequence[int], dim: int = 0) -> list[fx.Node] | None:
    if len(sizes) < 2 or len(set(sizes)) > 1 or sizes[0] < 2:
        return None
    dim %= len(_shape(x))
    rows = b(aten.unbind.int, _blocks(b, x, dim, int(sizes[0])), dim)
    return [b(operator.getitem, rows, number) for number in range(len(sizes))]


def cat(b: Builder, parts: Sequence[fx.Node], dim: int = 0) -> fx.Node | None:
    shape = _shape(parts[0])
    same = all(_shape(x) == shape and value_of(x).dtype == value_of(parts[0]).dtype for x in parts)
    if len(parts) < 2 or not same or shape[dim] < 2:
        return None
    dim %= len(shape)
    whole = [*shape[:dim], len(parts) * shape[dim], *shape[dim + 1 :]]
    return b(aten.view.default, b(aten.stack.default, list(parts), dim), whole)


def repeat(b: Builder, x: fx.Node, times: Sequence[int]) -> fx.Node:
    """A repeated dim becomes times x dim. One clone makes all copies."""
    shape = [1] * (len(times) - len(_shape(x))) + _shape(x)
    single = [n for size in shape for n in (1, size)]
    copied = [n for count, size in zip(times, shape, strict=True) for n in (int(count), size)]
    seen = b(aten.expand.default, b(aten.view.default, x, single), copied)
    seen = b(aten.clone.default, seen, memory_format=torch.contiguous_format)
    return b(aten.view.default, seen, [int(n) * size for n, size in zip(times, shape, strict=True)])


def adaptive_avg_pool(rank: int, pool: Any) -> Callable[..., fx.Node | None]:
    """Average pooling of blocks, if the input divides evenly by the output; the mean, if there is just one block."""

    def decomposition(b: Builder, x: fx.Node, size: Sequence[int]) -> fx.Node | None:
        space = _shape(x)[-rank:]
        if not all(out and n % out == 0 for n, out in zip(space, size, strict=True)):
            return None
        if all(out == 1 for out in size):
            total = b(aten.sum.dim_IntList, b.wide(x), list(range(-rank, 0)), True)
            return b(aten.div.Tensor, total, math.prod(space))
        kernel = [n // int(out) for n, out in zip(space, size, strict=True)]
        return b(pool, x, kernel, kernel)

    return decomposition


def adaptive_avg_pool_backward(rank: int, pool: Any) -> Callable[..., fx.Node | None]:
    def decomposition(b: Builder, grad: fx.Node, x: fx.Node) -> fx.Node | None:
        space, size = _shape(x)[-rank:], _shape(grad)[-rank:]
        if not all(out and n % out == 0 for n, out in zip(space, size, strict=True)):
            return None
        if all(out == 1 for out in size):
            spread = b(aten.expand.default, b(aten.div.Tensor, grad, math.prod(space)), _shape(x))
            return b(aten.clone.default, spread, memory_format=torch.contiguous_format)
        kernel = [n // out for n, out in zip(space, size, strict=True)]
        return b(pool, grad, x, kernel, kernel, [0] * rank, False, True, None)

    return decomposition


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    aten.slice.Tensor: slice_,
    aten.slice_backward.default: slice_backward,
    aten.split.Tensor: split,
    aten.split_with_sizes.default: split_with_sizes,
    aten.cat.default: cat,
    aten.repeat.default: repeat,
    aten._adaptive_avg_pool2d.default: adaptive_avg_pool(2, aten.avg_pool2d.default),
    aten._adaptive_avg_pool3d.default: adaptive_avg_pool(3, aten.avg_pool3d.default),
    aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool_backward(2, aten.avg_pool2d_backward.default),
    aten._adaptive_avg_pool3d_backward.default: adaptive_avg_pool_backward(3, aten.avg_pool3d_backward.default),
}
