"""Layer and RMS norms over dims that the mesh splits: ranks all-reduce only the sums of each row.

The normalised dims are the last dims of `x`. Part `d2` is the rank's part of dim 2 of `x`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardc.runtime.kernels.parts import Part, by_dim
from shardc.runtime.kernels.widening import widened

__all__ = ["layer_norm", "layer_norm_backward", "rms_norm"]


def layer_norm(
    x: Tensor, normalized: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, **parts: Part
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten.native_layer_norm`: the output, and each row's mean and 1/deviation."""
    wide, dims, count = widened(x), _last(x, normalized), math.prod(normalized)
    mean = _total(wide, dims, parts) / count
    offset = wide - mean
    inverse = torch.rsqrt(_total(offset * offset, dims, parts) / count + eps)
    result = offset * inverse
    result = result if weight is None else result * weight
    result = result if bias is None else result + bias
    stored = wide.dtype
    if x.device.type == "cpu":  # the CPU kernel keeps the statistics in the dtype of the parameters
        stored = x.dtype if weight is None else weight.dtype
    return result.to(x.dtype), mean.to(stored), inverse.to(stored)


def rms_norm(
    x: Tensor, normalized: Sequence[int], weight: Tensor | None, eps: float | None, **parts: Part
) -> tuple[Tensor, Tensor]:
    """`aten._fused_rms_norm`: the output, and each row's 1/root of the mean square."""
    wide, dims = widened(x), _last(x, normalized)
    square = _total(wide * wide, dims, parts) / math.prod(normalized)
    inverse = torch.rsqrt(square + (torch.finfo(wide.dtype).eps if eps is None else eps))
    result = wide * inverse
    return (result if weight is None else result * weight).to(x.dtype), inverse


def layer_norm_backward(
    grad: Tensor, x: Tensor, normalized: Sequence[int], mean: Tensor, inverse: Tensor, weight: Tensor | None,
    bias: Tensor | None, mask: Sequence[bool], **parts: Part,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`aten.native_layer_norm_backward`; `mask` says which gradients to compute: of x, of weight, of bias."""
    upper, dims, count = widened(grad), _last(x, normalized), math.prod(normalized)
    normal = (widened(x) - mean) * inverse
    batch = list(range(x.dim() - len(dims)))
    grad_x = grad_weight = grad_bias = None
    if mask[0]:
        slope = upper if weight is None else upper * weight
        sums = _total(torch.stack([slope, slope * normal]), [d + 1 for d in dims], parts, shift=1) / count
        grad_x = ((slope - sums[0] - normal * sums[1]) * inverse).to(x.dtype)
    if mask[1] and weight is not None:
        product = upper * normal
        grad_weight = (product.sum(batch) if batch else product).to(weight.dtype)
    if mask[2] and bias is not None:
        grad_bias = (upper.sum(batch) if batch else upper.clone()).to(bias.dtype)
    return grad_x, grad_weight, grad_bias


def _total(x: Tensor, dims: list[int], parts: Mapping[str, Part], shift: int = 0) -> Tensor:
    """The global sum over `dims`, kept as dims of size one. `x` has `shift` dims in front of those of the parts."""
    for place, part in by_dim(parts).items():
        x = part.fill(x, place + shift, 0)
    total = x.sum(dims, keepdim=True)
    for part in parts.values():
        total = part.reduce(total)
    return total


def _last(x: Tensor, normalized: Sequence[int]) -> list[int]:
    return list(range(x.dim() - len(normalized), x.dim()))
