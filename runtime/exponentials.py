"""Softmax and log-sum-exp over a dim that the mesh splits: only the extremes and the sums travel."""

from __future__ import annotations

import torch
from torch import Tensor

from shardc.runtime.parts import Part


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


def _exponents(x: Tensor, dim: int, half_to_float: bool, s: Part) -> tuple[Tensor, Tensor]:
    """`x` less its global maximum, and the global sum of the exponentials of that."""
    wide = x.float() if half_to_float or x.dtype in (torch.float16, torch.bfloat16) else x
    wide = s.fill(wide, dim, float("-inf"))
    shifted = wide - s.reduce(wide.amax(dim, keepdim=True), "max")
    return shifted, s.reduce(torch.exp(shifted).sum(dim, keepdim=True))


def softmax_backward(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype, *, s: Part) -> Tensor:
    """`aten._softmax_backward_data` over `dim`, of which this rank holds part `s`."""
    wide, result = _wide(grad), _wide(output)
    product = s.fill(wide * result, dim, 0)
    return (product - result * s.reduce(product.sum(dim, keepdim=True))).to(dtype)


def log_softmax_backward(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype, *, s: Part) -> Tensor:
    """`aten._log_softmax_backward_data` over `dim`, of which this rank holds part `s`."""
    wide, result = s.fill(_wide(grad), dim, 0), _wide(output)
    return (wide - torch.exp(result) * s.reduce(wide.sum(dim, keepdim=True))).to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
