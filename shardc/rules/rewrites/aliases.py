"""Operators that are shorthand for a few others, which do the same arithmetic."""

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
    """`any` and `all` of numbers, as those of booleans, which have an identity to fill padding with."""

    def decomposition(b: Builder, x: fx.Node, *rest: Any) -> fx.Node | None:
        if value_of(x).dtype is torch.bool:
            return None
        return b(operator, b(aten.ne.Scalar, x, 0), *rest)

    return decomposition


def addbmm(b: Builder, x: fx.Node, first: fx.Node, second: fx.Node, *, beta: float = 1, alpha: float = 1) -> fx.Node:
    """With beta 0, torch does not read `x`, so infinities and NaN in it do not reach the result."""
    total = b(aten.sum.dim_IntList, b(aten.bmm.default, first, second), [0], False)
    total = total if alpha == 1 else b(aten.mul.Tensor, total, alpha)
    if beta == 0:
        return total
    return b(aten.add.Tensor, x if beta == 1 else b(aten.mul.Tensor, x, beta), total)


def trilinear(
    b: Builder, first: fx.Node, second: fx.Node, third: fx.Node, expand_first: Sequence[int],
    expand_second: Sequence[int], expand_third: Sequence[int], summed: Sequence[int], _: int = 1,
) -> fx.Node:  # fmt: skip
    """The product of three tensors, each unsqueezed at its `expand` dims, summed over the dims `summed`."""
    product: fx.Node | None = None
    for x, dims in ((first, expand_first), (second, expand_second), (third, expand_third)):
        for dim in sorted(dims):
            x = b(aten.unsqueeze.default, x, dim)
        product = x if product is None else b(aten.mul.Tensor, product, x)
    assert product is not None
    return b(aten.sum.dim_IntList, product, list(summed), False) if summed else product


def put(b: Builder, x: fx.Node, index: fx.Node, source: fx.Node, accumulate: bool = False) -> fx.Node:
    """`index_put` into the flattened tensor."""
    shape = [int(n) for n in value_of(x).shape]
    flat, index, source = (b(aten.view.default, t, [value_of(t).numel()]) for t in (x, index, source))
    return b(aten.view.default, b(aten.index_put.default, flat, [index], source, accumulate), shape)


def prod(b: Builder, x: fx.Node, *, dtype: torch.dtype | None = None) -> fx.Node:
    flat = b(aten.view.default, x, [value_of(x).numel()])
    return b(aten.prod.dim_int, flat, 0, False, dtype=dtype)


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    aten.max.default: extreme(aten.amax.default),
    aten.min.default: extreme(aten.amin.default),
    **{
        operator: truth(operator)
        for packet in (aten.any, aten.all)
        for operator in (packet.default, packet.dim, packet.dims)
    },
    aten.addbmm.default: addbmm,
    aten._trilinear.default: trilinear,
    aten.put.default: put,
    aten.prod.default: prod,
}
