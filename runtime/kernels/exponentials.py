"""Softmax and log-sum-exp over a dim that the mesh splits: ranks exchange only the maximum and the sum of each row.

Each has two variants. Two all-reduces wait for the network twice; the bytes do not grow with the number of ranks. One
all-gather waits once; every rank receives two numbers a row from every other rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from shardc.runtime.kernels.parts import Part, by_dim
from shardc.runtime.kernels.widening import widened

__all__ = [
    "log_softmax",
    "log_softmax_backward",
    "log_softmax_gathered",
    "logsumexp",
    "logsumexp_gathered",
    "safe_softmax",
    "safe_softmax_gathered",
    "softmax",
    "softmax_backward",
    "softmax_gathered",
]


def softmax(x: Tensor, dim: int, half_to_float: bool, *, s: Part) -> Tensor:
    """`aten._softmax` over `dim`, of which this rank holds part `s`; two all-reduces."""
    return _softmax(_reduced, x, dim, half_to_float, s)


def softmax_gathered(x: Tensor, dim: int, half_to_float: bool, *, s: Part) -> Tensor:
    """`aten._softmax` over `dim`, of which this rank holds part `s`; one all-gather."""
    return _softmax(_gathered, x, dim, half_to_float, s)


def log_softmax(x: Tensor, dim: int, half_to_float: bool, *, s: Part) -> Tensor:
    """`aten._log_softmax` over `dim`, of which this rank holds part `s`; two all-reduces."""
    return _log_softmax(_reduced, x, dim, half_to_float, s)


def log_softmax_gathered(x: Tensor, dim: int, half_to_float: bool, *, s: Part) -> Tensor:
    """`aten._log_softmax` over `dim`, of which this rank holds part `s`; one all-gather."""
    return _log_softmax(_gathered, x, dim, half_to_float, s)


def safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None, *, s: Part) -> Tensor:
    """`aten._safe_softmax` over `dim`, of which this rank holds part `s`: rows that are all -inf give zeros. Two
    all-reduces."""
    return _safe_softmax(_reduced, x, dim, dtype, s)


def safe_softmax_gathered(x: Tensor, dim: int, dtype: torch.dtype | None = None, *, s: Part) -> Tensor:
    """`aten._safe_softmax` over `dim`, of which this rank holds part `s`: rows that are all -inf give zeros. One
    all-gather."""
    return _safe_softmax(_gathered, x, dim, dtype, s)


def logsumexp(x: Tensor, dim: Sequence[int], keepdim: bool = False, **parts: Part) -> Tensor:
    """`aten.logsumexp` over the dims `dim`; this rank holds parts of some. Two all-reduces for each part."""
    return _logsumexp(_reduced, x, dim, keepdim, parts)


def logsumexp_gathered(x: Tensor, dim: Sequence[int], keepdim: bool = False, **parts: Part) -> Tensor:
    """`aten.logsumexp` over the dims `dim`; this rank holds parts of some. One all-gather for each part."""
    return _logsumexp(_gathered, x, dim, keepdim, parts)


Finite = Callable[[Tensor], Tensor]
"""Replaces infinite maxima by zero, so that they can be subtracted."""
Statistics = Callable[[Tensor, tuple[int, ...], Mapping[int, Part], Finite], tuple[Tensor, Tensor]]
"""From a tensor, its reduced dims and the parts by dim: the finite maximum m of each row over all parts, and the sum of
exp(row - m)."""


def _reduced(wide: Tensor, dims: tuple[int, ...], parts: Mapping[int, Part], finite: Finite) -> tuple[Tensor, Tensor]:
    """By two all-reduces for each part: of the maxima, then of the sums."""
    top = wide.amax(dims, keepdim=True)
    for part in parts.values():
        top = part.reduce(top, "max")
    top = finite(top)
    total = (wide - top).exp_().sum(dims, keepdim=True)
    for part in parts.values():
        total = part.reduce(total)
    return top, total


def _gathered(wide: Tensor, dims: tuple[int, ...], parts: Mapping[int, Part], finite: Finite) -> tuple[Tensor, Tensor]:
    """By one all-gather for each part, of each row's local maximum and its sum relative to that."""
    top = wide.amax(dims, keepdim=True)
    total = (wide - finite(top)).exp_().sum(dims, keepdim=True)
    for dim, part in parts.items():
        tops, totals = part.gather(torch.stack([top, total]), dim % wide.dim() + 1)
        top = tops.amax(dim, keepdim=True)
        total = (totals * torch.exp(tops - finite(top))).sum(dim, keepdim=True)  # 0 * 0 for a row that is all -inf
    return finite(top), total


def _softmax(statistics: Statistics, x: Tensor, dim: int, half_to_float: bool, s: Part) -> Tensor:
    shifted, scale = _exponents(statistics, x, dim, half_to_float, s)
    result = shifted.exp_().div_(scale)
    return result if half_to_float else result.to(x.dtype)


def _log_softmax(statistics: Statistics, x: Tensor, dim: int, half_to_float: bool, s: Part) -> Tensor:
    shifted, scale = _exponents(statistics, x, dim, half_to_float, s)
    result = shifted.sub_(torch.log(scale))
    return result if half_to_float else result.to(x.dtype)


def _safe_softmax(statistics: Statistics, x: Tensor, dim: int, dtype: torch.dtype | None, s: Part) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    shifted, scale = _exponents(statistics, x, dim, False, s)
    return shifted.exp_().div_(scale.masked_fill(scale == 0, 1)).to(x.dtype)


def _logsumexp(
    statistics: Statistics, x: Tensor, dim: Sequence[int], keepdim: bool, parts: Mapping[str, Part]
) -> Tensor:
    dims, parts_by_dim = tuple(dim), by_dim(parts)
    wide = widened(x if x.is_floating_point() else x.to(torch.get_default_dtype()))
    for place, part in parts_by_dim.items():
        wide = part.fill(wide, place, float("-inf"))
    top, total = statistics(wide, dims, parts_by_dim, lambda top: top.masked_fill(top.isinf(), 0))
    result = torch.log(total) + top
    result = result.to(x.dtype) if x.is_floating_point() else result
    return result if keepdim else result.squeeze(dims)


def _exponents(statistics: Statistics, x: Tensor, dim: int, half_to_float: bool, s: Part) -> tuple[Tensor, Tensor]:
    """`x - m` with the global maximum m of each row, and the global sum of exp(x - m): 0 only if the row is all
    -inf."""
    wide = s.fill(x.float() if half_to_float else widened(x), dim, float("-inf"))
    top, total = statistics(wide, (dim,), {dim: s}, lambda top: top.masked_fill(top == float("-inf"), 0))
    return wide - top, total


def softmax_backward(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype, *, s: Part) -> Tensor:
    """`aten._softmax_backward_data` over `dim`, of which this rank holds part `s`."""
    wide, result = widened(grad), widened(output)
    product = s.fill(wide * result, dim, 0)
    return product.addcmul_(result, s.reduce(product.sum(dim, keepdim=True)), value=-1).to(dtype)


def log_softmax_backward(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype, *, s: Part) -> Tensor:
    """`aten._log_softmax_backward_data` over `dim`, of which this rank holds part `s`."""
    wide, result = s.fill(widened(grad), dim, 0), widened(output)
    return torch.exp(result).mul_(s.reduce(wide.sum(dim, keepdim=True))).neg_().add_(wide).to(dtype)
