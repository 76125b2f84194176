"""Operators that say in one word what others say in several; nothing here is computed in another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from shardc.ir.program import value_of
from shardc.rules.rewrites.builder import Builder

aten = torch.ops.aten


def extreme(operator: Any) -> Callable[[Builder, fx.Node], fx.Node]:
    """`max(x)` of all elements as `amax` over all dims; `min` likewise."""
    return lambda b, x: b(operator, x, list(range(value_of(x).dim())), False)


def truth(operator: Any) -> Callable[..., fx.Node | None]:
    """`any` and `all` of numbers as those of truth values, which have an identity to fill padding with."""

    def decomposition(b: Builder, x: fx.Node, *given: Any) -> fx.Node | None:
        if value_of(x).dtype is torch.bool:
            return None
        return b(operator, b(aten.ne.Scalar, x, 0), *given)

    return decomposition


def addbmm(b: Builder, x: fx.Node, first: fx.Node, second: fx.Node, *, beta: float = 1, alpha: float = 1) -> fx.Node:
    """With beta 0 torch does not read `x`: what is not finite in it is no part of the result."""
    total = b(aten.sum.dim_IntList, b(aten.bmm.default, first, second), [0], False)
    total = total if alpha == 1 else b(aten.mul.Tensor, total, alpha)
    if beta == 0:
        return total
    return b(aten.add.Tensor, x if beta == 1 else b(aten.mul.Tensor, x, beta), total)


def trilinear(
    b: Builder, first: fx.Node, second: fx.Node, third: fx.Node, expand_first: Sequence[int],
    expand_second: Sequence[int], expand_third: Sequence[int], summed: Sequence[int], _: int = 1,
) -> fx.Node:  # fmt: skip
    """The product of three, each with dims of size one put in, summed over `summed`."""
    product: fx.Node | None = None
    for x, dims in ((first, expand_first), (second, expand_second), (third, expand_third)):
        for dim in sorted(dims):
            x = b(aten.unsqueeze.default, x, dim)
        product = x if product is None else b(aten.mul.Tensor, product, x)
    assert product is not None
    return b(aten.sum.dim_IntList, product, list(summed), False) if summed else product


def put(b: Builder, x: fx.Node, index: fx.Node, source: fx.Node, accumulate: bool = False) -> fx.Node:
    """Writing into the flattened tensor."""
    shape = [int(n) for n in value_of(x).shape]
    flat, index, source = (b(aten.view.default, t, [value_of(t).numel()]) for t in (x, index, source))
    return b(aten.view.default, b(aten.index_put.default, flat, [index], source, accumulate), shape)


def prod(b: Builder, x: fx.Node, *, dtype: torch.dtype | None = None) -> fx.Node:
    flat = b(aten.view.default, x, [value_of(x).numel()])
    return b(aten.prod.dim_int, flat, 0, False, dtype=dtype)


def as_strided(
    b: Builder, x: fx.Node, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> fx.Node | None:
    """Strides over memory as indices into the flattened tensor, which is what memory holds if `x` lies plainly."""
    index = _places(b, x, size, stride, offset or 0)
    return None if index is None else b(aten.index.Tensor, _flat(b, x), [index])


def as_strided_scatter(
    b: Builder, x: fx.Node, source: fx.Node, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> fx.Node | None:
    index = _places(b, x, size, stride, offset or 0)
    if index is None:
        return None
    put = b(aten.index_put.default, _flat(b, x), [index], source)
    return b(aten.view.default, put, [int(n) for n in value_of(x).shape])


def _flat(b: Builder, x: fx.Node) -> fx.Node:
    return b(aten.view.default, x, [value_of(x).numel()])


def _places(b: Builder, x: fx.Node, size: Sequence[int], stride: Sequence[int], offset: int) -> fx.Node | None:
    """Where in the flattened `x` every element of the strided view lies; None if that is no place of `x` itself."""
    value = value_of(x)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if not value.is_contiguous() or value.storage_offset() or 0 in size or last >= value.numel():
        return None
    place = b.full(x, [1] * len(size), offset, torch.int64)
    for dim, (count, step) in enumerate(zip(size, stride, strict=True)):
        if count > 1:
            own = b(aten.mul.Tensor, b.arange(x, count), step)
            shape = [count if d == dim else 1 for d in range(len(size))]
            place = b(aten.add.Tensor, place, b(aten.view.default, own, shape))
    return place


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    aten.max.default: extreme(aten.amax.default),
    aten.min.default: extreme(aten.amin.default),
    **{operator: truth(operator) for kind in (aten.any, aten.all) for operator in (kind.default, kind.dim, kind.dims)},
    aten.addbmm.default: addbmm,
    aten._trilinear.default: trilinear,
    aten.put.default: put,
    aten.prod.default: prod,
    aten.as_strided.default: as_strided,
    aten.as_strided_copy.default: as_strided,
    aten.as_strided_scatter.default: as_strided_scatter,
}
