"""Views that a trace reads, or writes back into their base: slices, selections, diagonals, and `as_strided`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from shardc.ir.facts import captured
from shardc.ir.program import value_of
from shardc.rules.rewrites.builder import Builder

aten = torch.ops.aten


@dataclass(frozen=True)
class _Window:
    """The elements that a strided view selects, as offsets in the operand's memory, which starts at 0."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def order(self) -> list[int] | None:
        """The dims from major to minor if the elements have neither gaps nor overlap in memory, else None."""
        dims = sorted(range(len(self.size)), key=lambda d: (-self.stride[d], -self.size[d]))
        expected = 1
        for dim in reversed(dims):
            if self.size[dim] != 1 and self.stride[dim] != expected:
                return None
            expected *= self.size[dim]
        return dims

    def places(self, b: Builder, like: fx.Node) -> fx.Node:
        """The offsets as an index tensor of the window's shape."""
        total = b.full(like, [1] * len(self.size), self.start, torch.int64)
        for dim, (n, stride) in enumerate(zip(self.size, self.stride, strict=True)):
            shape = [n if d == dim else 1 for d in range(len(self.size))]
            steps = b.view(b(aten.mul.Tensor, b.arange(like, n), stride), shape)
            total = b(aten.add.Tensor, total, steps)
        return total


def as_strided(
    b: Builder, x: fx.Node, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> fx.Node | None:
    selection = _window(x, size, stride, offset)
    if selection is None:
        return None
    window, order = selection
    flat = _flat(b, x, order)
    dims = window.order
    if dims is not None and window.start == 0 and math.prod(window.size) == value_of(x).numel():
        viewed = b.view(flat, [window.size[d] for d in dims])
        return b(aten.permute.default, viewed, [dims.index(d) for d in range(len(dims))])
    return b(aten.index.Tensor, flat, [window.places(b, x)])


def as_strided_scatter(
    b: Builder, x: fx.Node, source: fx.Node, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> fx.Node | None:
    selection = _window(x, size, stride, offset)
    if selection is None:
        return None
    window, order = selection
    dims = window.order
    if dims is not None and window.start == 0 and math.prod(window.size) == value_of(x).numel():
        flat = b.view(b(aten.permute.default, source, dims), [value_of(x).numel()])
    else:
        flat = b(aten.index_put.default, _flat(b, x, order), [window.places(b, x)], source)
    viewed = b.view(flat, [int(value_of(x).shape[d]) for d in order])
    return b(aten.permute.default, viewed, [order.index(d) for d in range(len(order))])


def _window(
    x: fx.Node, size: Sequence[int], stride: Sequence[int], offset: int | None
) -> tuple[_Window, list[int]] | None:
    """The call's window, and the operand's dims from major to minor in memory.

    None if the operand has gaps in memory, or the window reaches beyond it.
    """
    value = value_of(x)
    strides = captured(x).strides or value.stride()
    order = _Window(tuple(int(n) for n in value.shape), tuple(int(n) for n in strides), 0).order
    start = 0 if offset is None else offset - int(value.storage_offset())
    reach = start + sum((n - 1) * step for n, step in itertools.zip_longest(size, stride))
    if order is None or start < 0 or reach >= value.numel() or 0 in size:
        return None
    return _Window(tuple(size), tuple(stride), start), order


def _flat(b: Builder, x: fx.Node, order: list[int]) -> fx.Node:
    return b.view(b(aten.permute.default, x, order), [value_of(x).numel()])


def slice_scatter(
    b: Builder, x: fx.Node, source: fx.Node, dim: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> fx.Node:  # fmt: skip
    sizes, dim = [int(n) for n in value_of(x).shape], dim % value_of(x).dim()
    first, last, _ = slice(start, end, step).indices(sizes[dim])
    if (first, last, step) == (0, sizes[dim], 1):
        return source
    places = b.arange(x, sizes[dim])
    inside = b(aten.logical_and.default, b(aten.ge.Scalar, places, first), b(aten.lt.Scalar, places, last))
    if step != 1:
        hit = b(aten.eq.Scalar, b(aten.remainder.Scalar, b(aten.sub.Tensor, places, first), step), 0)
        inside = b(aten.logical_and.default, inside, hit)
    put = b(aten.slice_backward.default, source, sizes, dim, first, max(first, last), step)
    return b(aten.where.self, _along(b, inside, dim, sizes), put, x)


def select_scatter(b: Builder, x: fx.Node, source: fx.Node, dim: int, index: int) -> fx.Node:
    sizes, dim = [int(n) for n in value_of(x).shape], dim % value_of(x).dim()
    hit = b(aten.eq.Scalar, b.arange(x, sizes[dim]), index % sizes[dim])
    return b(aten.where.self, _along(b, hit, dim, sizes), b(aten.select_backward.default, source, sizes, dim, index), x)


def diagonal_scatter(b: Builder, x: fx.Node, source: fx.Node, offset: int = 0, dim1: int = 0, dim2: int = 1) -> fx.Node:
    sizes, rank = [int(n) for n in value_of(x).shape], value_of(x).dim()
    row, column = dim1 % rank, dim2 % rank
    rows, columns = (_along(b, b.arange(x, sizes[d]), d, sizes) for d in (row, column))
    hit = b(aten.eq.Tensor, b(aten.add.Tensor, rows, offset), columns)
    return b(aten.where.self, hit, b(aten.diagonal_backward.default, source, sizes, offset, row, column), x)


def _along(b: Builder, vector: fx.Node, dim: int, sizes: Sequence[int]) -> fx.Node:
    return b.view(vector, [n if d == dim else 1 for d, n in enumerate(sizes)])


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    aten.as_strided.default: as_strided,
    aten.as_strided_copy.default: as_strided,
    aten.as_strided_scatter.default: as_strided_scatter,
    aten.slice_scatter.default: slice_scatter,
    aten.select_scatter.default: select_scatter,
    aten.diagonal_scatter.default: diagonal_scatter,
}
