"""Softmax and log-sum-exp over a dim that the mesh splits: only the extremes and the sums travel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardc.runtime.kernels.parts import Part, by_dim
from shardc.runtime.kernels.widening import widened

__all__ = ["log_softmax", "log_softmax_backward", "logsumexp", "safe_softmax", "softmax", "softmax_backward"]


def softmax(x: Tensor, dim: int, half_to_float: bool, *, s: Part) -> Tensor:
    """`aten._softmax` over `dim`, of which this rank holds part `s`."""
    shifted, scale = _exponents(x, dim, half_to_float, s)
    result = torch.exp(shifted) / scale
    return result if half_to_float else result.to(x.dtype)


def log_softmax(x: Tensor, dim: int, half_to_float: bool, *, s: Part) -> Tensor:
    """`aten._log_softmax` over `dim`, of which this rank holds part `s`."""
    shifted, scale = _exponents(x, dim, half_to_float, s)
    result = shifted - torch.log(scale)
    return result if half_to_float else result.to(x.dtype)


def safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None, *, s: Part) -> Tensor:
    """`aten._safe_softmax` over `dim`, of which this rank holds part `s`: rows of nothing but -inf give zeros."""
    given = x if dtype is None else x.to(dtype)
    wide = s.fill(widened(given), dim, float("-inf"))
    top = s.reduce(wide.amax(dim, keepdim=True), "max")
    nothing = top == float("-inf")
    powers = torch.exp(wide - top.masked_fill(nothing, 0))
    scale = s.reduce(powers.sum(dim, keepdim=True)).masked_fill(nothing, 1)
    return (powers / scale).to(given.dtype)


def logsumexp(x: Tensor, dim: Sequence[int], keepdim: bool = False, **parts: Part) -> Tensor:
    """`aten.logsumexp` over the dims `dim`; this rank holds the given parts of some of them."""
    dims = tuple(dim)
    wide = widened(x if x.is_floating_point() else x.to(torch.get_default_dtype()))
    for place, part in by_dim(parts).items():
        wide = part.fill(wide, place, float("-inf"))
    top = wide.amax(dims, keepdim=True)
    for part in parts.values():
        top = part.reduce(top, "max")
    top = top.masked_fill(top.isinf(), 0)
    total = torch.exp(wide - top).sum(dims, keepdim=True)
    for part in parts.values():
        total = part.reduce(total)
    result = torch.log(total) + top
    result = result.to(x.dtype) if x.is_floating_point() else result
    return result if keepdim else result.squeeze(dims)


def _exponents(x: Tensor, dim: int, half_to_float: bool, s: Part) -> tuple[Tensor, Tensor]:
    """`x` less its global maximum, and the global sum of the exponentials of that."""
    wide = x.float() if half_to_float else widened(x)
    wide = s.fill(wide, dim, float("-inf"))
    shifted = wide - s.reduce(wide.amax(dim, keepdim=True), "max")
    return shifted, s.reduce(torch.exp(shifted).sum(dim, keepdim=True))


def softmax_backward(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype, *, s: Part) -> Tensor:
    """`aten._softmax_backward_data` over `dim`, of which this rank holds part `s`."""
    wide, result = widened(grad), widened(output)
    product = s.fill(wide * result, dim, 0)
    return (product - result * s.reduce(product.sum(dim, keepdim=True))).to(dtype)


def log_softmax_backward(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype, *, s: Part) -> Tensor:
    """`aten._log_softmax_backward_data` over `dim`, of which this rank holds part `s`."""
    wide, result = s.fill(widened(grad), dim, 0), widened(output)
    return (wide - torch.exp(result) * s.reduce(wide.sum(dim, keepdim=True))).to(dtype)
