"""Decompositions: operators rewritten into others before layouts are chosen. Counts are global, so any dim may be
split.

A decomposition takes a `Builder` and the operator's arguments. It returns the node (or a tuple of nodes) that replaces
the result, or None to leave the operator alone. `normalize` casts the nodes to the dtypes of the operator's results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from shardc.ir.program import value_of
from shardc.rules.rewrites import aliases, bags, blocks, factorisations, losses, randomness, scatter_views
from shardc.rules.rewrites.builder import Builder, count_of, dims_of

aten = torch.ops.aten


def mean(b: Builder, x: fx.Node, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> fx.Node:
    """The sum over `dim`, divided by the global number of elements."""
    dims = dims_of(x, dim)
    wide = b.wide(x if dtype is None else b.cast(x, dtype))  # a sum of halves may overflow where the mean does not
    return b(aten.div.Tensor, b(aten.sum.dim_IntList, wide, dims, keepdim), count_of(x, dims))


def mean_all(b: Builder, x: fx.Node, dtype: Any = None) -> fx.Node:
    return mean(b, x, None, False, dtype)


def var(b: Builder, x: fx.Node, dim: Any = None, correction: Any = None, keepdim: bool = False) -> fx.Node:
    """The mean squared offset from the mean, over the global number of elements less `correction`."""
    dims, x = dims_of(x, dim), b.wide(x)
    offset = b(aten.sub.Tensor, x, mean(b, x, dims, True))
    total = b(aten.sum.dim_IntList, b(aten.mul.Tensor, offset, offset), dims, keepdim)
    return b(aten.div.Tensor, total, max(count_of(x, dims) - (1 if correction is None else correction), 0))


def var_mean(
    b: Builder, x: fx.Node, dim: Any = None, correction: Any = None, keepdim: bool = False
) -> tuple[fx.Node, ...]:
    return var(b, x, dim, correction, keepdim), mean(b, x, dim, keepdim)


def std(b: Builder, x: fx.Node, dim: Any = None, correction: Any = None, keepdim: bool = False) -> fx.Node:
    return b(aten.sqrt.default, var(b, x, dim, correction, keepdim))


def std_mean(
    b: Builder, x: fx.Node, dim: Any = None, correction: Any = None, keepdim: bool = False
) -> tuple[fx.Node, ...]:
    return std(b, x, dim, correction, keepdim), mean(b, x, dim, keepdim)


def vector_norm(
    b: Builder, x: fx.Node, order: float | None = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> fx.Node:
    """The norm of any order. Those of infinite order are extremes."""
    dims, order = dims_of(x, dim), 2.0 if order is None else float(order)
    size = b(aten.abs.default, b.wide(x if dtype is None else b.cast(x, dtype)))
    if order in (float("inf"), float("-inf")):
        return b(aten.amax.default if order > 0 else aten.amin.default, size, dims, keepdim)
    if order == 0:
        nonzero = b(aten._to_copy.default, b(aten.ne.Scalar, size, 0), dtype=value_of(size).dtype)
        return b(aten.sum.dim_IntList, nonzero, dims, keepdim)
    if order == 1:
        return b(aten.sum.dim_IntList, size, dims, keepdim)
    if order == 2:
        return b(aten.sqrt.default, b(aten.sum.dim_IntList, b(aten.mul.Tensor, size, size), dims, keepdim))
    total = b(aten.sum.dim_IntList, b(aten.pow.Tensor_Scalar, size, order), dims, keepdim)
    return b(aten.pow.Tensor_Scalar, total, 1 / order)


def constant(value: float | None, shaped: bool) -> Callable[..., fx.Node]:
    """`new_zeros` and the like read no element of their operand. As constants they do not demand a layout of it.

    The fill value is an argument of the call if `value` is None, and the shape is one if `shaped`.
    """

    def decomposition(b: Builder, x: fx.Node, *rest: Any, dtype: torch.dtype | None = None, **_: Any) -> fx.Node:
        shape = [int(n) for n in (rest[0] if shaped else value_of(x).shape)]
        return b.full(x, shape, rest[int(shaped)] if value is None else value, dtype)

    return decomposition


def glu(b: Builder, x: fx.Node, dim: int = -1) -> fx.Node:
    """The first half of `dim`, times the sigmoid of the second (Dauphin et al. 2017)."""
    value, gate = _halves(b, x, dim)
    return b(aten.mul.Tensor, value, b(aten.sigmoid.default, gate))


def glu_backward(b: Builder, grad: fx.Node, x: fx.Node, dim: int) -> fx.Node:
    value, gate = _halves(b, x, dim)
    opened = b(aten.sigmoid.default, gate)
    through = b(aten.sigmoid_backward.default, b(aten.mul.Tensor, grad, value), opened)
    return b(aten.cat.default, [b(aten.mul.Tensor, grad, opened), through], dim % value_of(x).dim())


def _halves(b: Builder, x: fx.Node, dim: int) -> tuple[fx.Node, fx.Node]:
    dim %= value_of(x).dim()
    size = int(value_of(x).shape[dim])
    return b(aten.slice.Tensor, x, dim, 0, size // 2), b(aten.slice.Tensor, x, dim, size // 2, size)


def log_sigmoid(b: Builder, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The second result is a buffer for backward, which is empty except on the CPU."""
    buffer = b(aten.exp.default, b(aten.neg.default, b(aten.abs.default, x)))
    result = b(aten.sub.Tensor, b(aten.clamp_max.default, x, 0), b(aten.log1p.default, buffer))
    return result, buffer if value_of(x).device.type == "cpu" else b.zeros(x, [0])


def index_put(
    b: Builder, x: fx.Node, indices: Sequence[fx.Node | None], values: fx.Node, accumulate: bool = False
) -> fx.Node | None:
    """Writing a single value under a boolean mask is a `where`."""
    mask = indices[0]
    if len(indices) != 1 or mask is None or value_of(mask).dtype is not torch.bool or value_of(values).numel() != 1:
        return None
    shape = [int(n) for n in value_of(mask).shape]
    shape += [1] * (value_of(x).dim() - len(shape))
    put = b(aten.view.default, values, [])
    return b(aten.where.self, b(aten.view.default, mask, shape), b(aten.add.Tensor, x, put) if accumulate else put, x)


def embedding_dense_backward(
    b: Builder, grad: fx.Node, indices: fx.Node, rows: int, padding: int = -1, by_frequency: bool = False
) -> fx.Node | None:
    """The row of the padding index gets no gradient. Masking it avoids rebasing that index on every rank."""
    if padding < 0:
        return None
    real = b(aten.unsqueeze.default, b(aten.ne.Scalar, indices, padding), value_of(indices).dim())
    masked = b(aten.mul.Tensor, grad, b(aten._to_copy.default, real, dtype=value_of(grad).dtype))
    return b(aten.embedding_dense_backward.default, masked, indices, rows, -1, by_frequency)


def batch_norm(
    b: Builder, x: fx.Node, weight: fx.Node | None, bias: fx.Node | None, running_mean: fx.Node | None,
    running_var: fx.Node | None, training: bool, momentum: float, eps: float,
) -> tuple[fx.Node, ...]:  # fmt: skip
    """Batch normalization (Ioffe and Szegedy 2015, algorithm 1) over the global batch.

    Results: output, mean, 1/deviation, new running mean, new running variance.
    """
    x = b.wide(x)
    dims = [d for d in range(value_of(x).dim()) if d != 1]
    count = count_of(x, dims)
    if training:
        average = mean(b, x, dims, True)
        offset = b(aten.sub.Tensor, x, average)
        square = mean(b, b(aten.mul.Tensor, offset, offset), dims, True)
    else:
        assert running_mean is not None and running_var is not None
        average, square = _channelwise(b, running_mean, x), _channelwise(b, running_var, x)
        offset = b(aten.sub.Tensor, x, average)
    inverse = b(aten.rsqrt.default, b(aten.add.Tensor, square, eps))
    output = b(aten.mul.Tensor, offset, inverse)
    if weight is not None:
        output = b(aten.mul.Tensor, output, _channelwise(b, weight, x))
    if bias is not None:
        output = b(aten.add.Tensor, output, _channelwise(b, bias, x))
    channels = [int(value_of(x).shape[1])]
    flat_mean = b(aten.view.default, average, channels)
    flat_inverse = b(aten.view.default, inverse, channels)
    if not training or running_mean is None or running_var is None:
        empty = b.zeros(x, [0])
        saved = (flat_mean, flat_inverse) if training else (empty, empty)
        return output, *saved, running_mean or empty, running_var or empty
    unbiased = b(aten.mul.Tensor, b(aten.view.default, square, channels), count / max(count - 1, 1))
    return (
        output, flat_mean, flat_inverse,
        _blend(b, running_mean, flat_mean, momentum), _blend(b, running_var, unbiased, momentum),
    )  # fmt: skip


def batch_norm_with_update(
    b: Builder, x: fx.Node, weight: fx.Node | None, bias: fx.Node | None, running_mean: fx.Node, running_var: fx.Node,
    momentum: float, eps: float,
) -> tuple[fx.Node, ...]:  # fmt: skip
    """`batch_norm` in training. The fourth result is memory for the backward of other kernels; empty here."""
    results = batch_norm(b, x, weight, bias, running_mean, running_var, True, momentum, eps)
    return *results[:3], b.full(x, [0], 0, torch.uint8), *results[3:]


def _blend(b: Builder, old: fx.Node, new: fx.Node, momentum: float) -> fx.Node:
    return b(aten.add.Tensor, b(aten.mul.Tensor, old, 1 - momentum), b(aten.mul.Tensor, new, momentum))


def _channelwise(b: Builder, vector: fx.Node, x: fx.Node) -> fx.Node:
    rank = value_of(x).dim()
    return b(aten.view.default, vector, [1, int(value_of(x).shape[1]), *[1] * (rank - 2)])


def batch_norm_backward(
    b: Builder, grad: fx.Node, x: fx.Node, weight: fx.Node | None, running_mean: fx.Node | None,
    running_var: fx.Node | None,
    saved_mean: fx.Node | None, saved_inverse: fx.Node | None, training: bool, eps: float, mask: Sequence[bool],
) -> tuple[fx.Node | None, ...]:  # fmt: skip
    """The gradients of x, weight and bias (Ioffe and Szegedy 2015, section 3), over the global batch."""
    grad, x = b.wide(grad), b.wide(x)
    dims = [d for d in range(value_of(x).dim()) if d != 1]
    count = count_of(x, dims)
    if training:
        assert saved_mean is not None and saved_inverse is not None
        average, inverse = _channelwise(b, saved_mean, x), _channelwise(b, saved_inverse, x)
    else:
        assert running_mean is not None and running_var is not None
        average = _channelwise(b, running_mean, x)
        inverse = b(aten.rsqrt.default, b(aten.add.Tensor, _channelwise(b, running_var, x), eps))
    normal = b(aten.mul.Tensor, b(aten.sub.Tensor, x, average), inverse)
    grad_bias = b(aten.sum.dim_IntList, grad, dims, True)
    grad_weight = b(aten.sum.dim_IntList, b(aten.mul.Tensor, grad, normal), dims, True)
    inner = grad
    if training:
        inner = b(aten.sub.Tensor, inner, b(aten.div.Tensor, grad_bias, count))
        inner = b(aten.sub.Tensor, inner, b(aten.mul.Tensor, normal, b(aten.div.Tensor, grad_weight, count)))
    grad_x = b(aten.mul.Tensor, inner, inverse)
    if weight is not None:
        grad_x = b(aten.mul.Tensor, grad_x, _channelwise(b, weight, x))
    channels = [int(value_of(x).shape[1])]
    return grad_x, b(aten.view.default, grad_weight, channels), b(aten.view.default, grad_bias, channels)


def group_norm(
    b: Builder, x: fx.Node, weight: fx.Node | None, bias: fx.Node | None, batch: int, channels: int, space: int,
    groups: int, eps: float,
) -> tuple[fx.Node, ...]:  # fmt: skip
    """Group normalization (Wu and He 2018). Results: output, mean and 1/deviation per sample and group."""
    shape, inner = [int(n) for n in value_of(x).shape], channels // groups
    wide = b(aten.view.default, b.wide(x), [batch, groups, inner, space])
    average = mean(b, wide, [2, 3], True)
    offset = b(aten.sub.Tensor, wide, average)
    square = mean(b, b(aten.mul.Tensor, offset, offset), [2, 3], True)
    inverse = b(aten.rsqrt.default, b(aten.add.Tensor, square, eps))
    output = b(aten.mul.Tensor, offset, inverse)
    if weight is not None:
        output = b(aten.mul.Tensor, output, b(aten.view.default, weight, [1, groups, inner, 1]))
    if bias is not None:
        output = b(aten.add.Tensor, output, b(aten.view.default, bias, [1, groups, inner, 1]))
    flat = [batch, groups]
    output = b.cast(output, value_of(x).dtype)
    return b(aten.view.default, output, shape), b(aten.view.default, average, flat), b(aten.view.default, inverse, flat)


def group_norm_backward(
    b: Builder, grad: fx.Node, x: fx.Node, average: fx.Node, inverse: fx.Node, weight: fx.Node | None, batch: int,
    channels: int, space: int, groups: int, mask: Sequence[bool],
) -> tuple[fx.Node | None, ...]:  # fmt: skip
    """The gradients of x, weight and bias; None for those that `mask` leaves out."""
    shape, inner = [int(n) for n in value_of(x).shape], channels // groups
    full, flat = [batch, groups, inner, space], [batch, groups, 1, 1]
    average, inverse = b(aten.view.default, average, flat), b(aten.view.default, inverse, flat)
    upper = b(aten.view.default, b.wide(grad), full)
    normal = b(aten.mul.Tensor, b(aten.sub.Tensor, b(aten.view.default, b.wide(x), full), average), inverse)
    weight_grad = b(aten.sum.dim_IntList, b(aten.mul.Tensor, upper, normal), [0, 3], False)
    bias_grad = b(aten.sum.dim_IntList, upper, [0, 3], False)
    if weight is not None:
        upper = b(aten.mul.Tensor, upper, b(aten.view.default, weight, [1, groups, inner, 1]))
    along = mean(b, b(aten.mul.Tensor, upper, normal), [2, 3], True)
    slope = b(aten.sub.Tensor, upper, mean(b, upper, [2, 3], True))
    slope = b(aten.sub.Tensor, slope, b(aten.mul.Tensor, normal, along))
    result = b.cast(b(aten.mul.Tensor, slope, inverse), value_of(x).dtype)
    return (
        b(aten.view.default, result, shape) if mask[0] else None,
        b(aten.view.default, weight_grad, [channels]) if mask[1] else None,
        b(aten.view.default, bias_grad, [channels]) if mask[2] else None,
    )


def rms_norm_backward(
    b: Builder, grad: fx.Node, x: fx.Node, normalized: Sequence[int], inverse: fx.Node, weight: fx.Node | None,
    mask: Sequence[bool],
) -> tuple[fx.Node | None, fx.Node | None]:  # fmt: skip
    """The gradients of x and weight, where y = x / rms(x) * weight and `inverse` is 1 / rms(x)."""
    batch = value_of(x).dim() - len(normalized)
    upper, normal = b.wide(grad), b(aten.mul.Tensor, b.wide(x), inverse)
    weight_grad = None
    if mask[1] and weight is not None:
        product = b(aten.mul.Tensor, upper, normal)
        weight_grad = b(aten.sum.dim_IntList, product, list(range(batch)), False) if batch else product
    if weight is not None:
        upper = b(aten.mul.Tensor, upper, weight)
    along = mean(b, b(aten.mul.Tensor, upper, normal), list(range(batch, value_of(x).dim())), True)
    slope = b(aten.sub.Tensor, upper, b(aten.mul.Tensor, normal, along))
    return b(aten.mul.Tensor, slope, inverse) if mask[0] else None, weight_grad


def weight_norm(b: Builder, direction: fx.Node, size: fx.Node, dim: int = 0) -> tuple[fx.Node, fx.Node]:
    """`direction` scaled to norms `size` along all dims but `dim` (Salimans and Kingma 2016), and its norms before."""
    rest = [d for d in range(value_of(direction).dim()) if d != dim]
    norms = b.cast(vector_norm(b, direction, 2, rest, True), b.result[1].dtype)
    return b(aten.mul.Tensor, direction, b(aten.div.Tensor, size, norms)), norms


def weight_norm_backward(
    b: Builder, grad: fx.Node, direction: fx.Node, size: fx.Node, norms: fx.Node, dim: int
) -> tuple[fx.Node, fx.Node]:
    rest = [d for d in range(value_of(direction).dim()) if d != dim]
    along = b(aten.sum.dim_IntList, b(aten.mul.Tensor, grad, direction), rest, True)
    grad_size = b(aten.div.Tensor, along, norms)
    unit = b(aten.div.Tensor, direction, norms)
    slope = b(aten.sub.Tensor, grad, b(aten.mul.Tensor, unit, grad_size))
    return b(aten.mul.Tensor, b(aten.div.Tensor, size, norms), slope), grad_size


def repeat_interleave(b: Builder, times: fx.Node, *, output_size: int | None = None) -> fx.Node | None:
    """The index of every copy: the number of running totals up to its position. None unless `output_size` is set."""
    if output_size is None:
        return None
    ends = b(aten.cumsum.default, times, 0)
    places = b(aten.unsqueeze.default, b.arange(times, output_size), 1)
    return b(aten.sum.dim_IntList, b(aten.ge.Tensor, places, ends), [1], False)


Decomposition = Callable[..., Any]
DECOMPOSITIONS: dict[Any, Decomposition] = {
    aten.mean.dim: mean,
    aten.mean.default: mean_all,
    aten.var.correction: var,
    aten.var_mean.correction: var_mean,
    aten.std.correction: std,
    aten.std_mean.correction: std_mean,
    aten.linalg_vector_norm.default: vector_norm,
    aten.norm.ScalarOpt_dim: vector_norm,
    aten.glu.default: glu,
    aten.glu_backward.default: glu_backward,
    aten.log_sigmoid_forward.default: log_sigmoid,
    aten.index_put.default: index_put,
    aten._weight_norm_interface.default: weight_norm,
    aten._weight_norm_interface_backward.default: weight_norm_backward,
    aten.repeat_interleave.Tensor: repeat_interleave,
    # empty tensors hold zeros here, so that all ranks have equal ones
    aten.new_zeros.default: constant(0, True),
    aten.new_ones.default: constant(1, True),
    aten.new_full.default: constant(None, True),
    aten.new_empty.default: constant(0, True),
    aten.new_empty_strided.default: constant(0, True),
    aten.zeros_like.default: constant(0, False),
    aten.ones_like.default: constant(1, False),
    aten.full_like.default: constant(None, False),
    aten.empty_like.default: constant(0, False),
    aten.embedding_dense_backward.default: embedding_dense_backward,
    **blocks.DECOMPOSITIONS,
    **losses.DECOMPOSITIONS,
    **aliases.DECOMPOSITIONS,
    **factorisations.DECOMPOSITIONS,
    **randomness.DECOMPOSITIONS,
    **bags.DECOMPOSITIONS,
    **scatter_views.DECOMPOSITIONS,
    aten._fused_rms_norm_backward.default: rms_norm_backward,
    aten.native_group_norm.default: group_norm,
    aten.native_group_norm_backward.default: group_norm_backward,
    aten._native_batch_norm_legit_functional.default: batch_norm,
    aten.native_batch_norm_backward.default: batch_norm_backward,
    aten._batch_norm_with_update_functional.default: batch_norm_with_update,
    aten.batch_norm_backward.default: lambda b, *args: batch_norm_backward(b, *args[:-1]),
    aten._native_batch_norm_legit.no_stats: lambda b, x, w, bias, training, momentum, eps: batch_norm(
        b, x, w, bias, None, None, training, momentum, eps
    )[:3],
    aten._native_batch_norm_legit_no_training.default: lambda b, x, w, bias, mean_, var_, momentum, eps: batch_norm(
        b, x, w, bias, mean_, var_, False, momentum, eps
    )[:3],
}
