"""Operators rewritten into others before layouts are chosen, each with global counts, so that any dim may be split.

A decomposition takes a `Builder` and the operator's arguments and returns the node (or a tuple of nodes) that replaces its
result; None leaves the operator alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from shardc.graph import value_of
from shardc.runtime.random import bernoulli

aten = torch.ops.aten


class Builder:
    """Adds operators to a graph before `node`, with their fake values and the provenance of `node`."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self._graph = graph
        self._node = node

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        new = self._graph.call_function(target, args, kwargs)
        new.meta.update({k: v for k, v in self._node.meta.items() if k in ("module", "source", "phase")})
        values = fx.node.map_arg((args, kwargs), value_of)
        new.meta["val"] = target(*values[0], **values[1])
        return new

    def mask(self, x: fx.Node, keep: float) -> fx.Node:
        """What eager dropout draws for `x`: it draws in the order in which `x` lies in memory."""
        value = value_of(x)
        shape, strides = [int(n) for n in value.shape], [int(n) for n in value.stride()]
        more = {} if value.is_contiguous() else {"strides": strides}
        new = self._graph.call_function(bernoulli, (shape, keep), {"dtype": value.dtype, **more})
        new.meta.update({k: v for k, v in self._node.meta.items() if k in ("module", "source", "phase")})
        new.meta["val"] = value.new_empty(shape)
        return new

    def zeros(self, like: fx.Node, shape: Sequence[int]) -> fx.Node:
        new = self._graph.call_function(
            aten.full.default, (list(shape), 0), {"dtype": value_of(like).dtype, "device": value_of(like).device}
        )
        new.meta.update({k: v for k, v in self._node.meta.items() if k in ("module", "source", "phase")})
        new.meta["val"] = value_of(like).new_zeros(list(shape))
        return new


def _dims(x: fx.Node, dims: Any) -> list[int]:
    rank = value_of(x).dim()
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def _count(x: fx.Node, dims: Sequence[int]) -> int:
    return math.prod(int(value_of(x).shape[d]) for d in dims)


def mean(b: Builder, x: fx.Node, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> fx.Node:
    dims = _dims(x, dim)
    total = b(aten.sum.dim_IntList, x, dims, keepdim, **({} if dtype is None else {"dtype": dtype}))
    return b(aten.div.Tensor, total, _count(x, dims))


def mean_all(b: Builder, x: fx.Node, dtype: Any = None) -> fx.Node:
    return mean(b, x, None, False, dtype)


def var(b: Builder, x: fx.Node, dim: Any = None, correction: Any = None, keepdim: bool = False) -> fx.Node:
    dims = _dims(x, dim)
    average = mean(b, x, dims, True)
    offset = b(aten.sub.Tensor, x, average)
    total = b(aten.sum.dim_IntList, b(aten.mul.Tensor, offset, offset), dims, keepdim)
    return b(aten.div.Tensor, total, _count(x, dims) - (1 if correction is None else correction))


def var_mean(
    b: Builder, x: fx.Node, dim: Any = None, correction: Any = None, keepdim: bool = False
) -> tuple[fx.Node, ...]:
    return var(b, x, dim, correction, keepdim), mean(b, x, dim, keepdim)


def native_dropout(
    b: Builder, x: fx.Node, probability: float, train: bool | None = True
) -> tuple[fx.Node, fx.Node] | None:
    if not train or probability in (0.0, 1.0):
        return None
    mask = b.mask(x, 1 - probability)
    kept = b(aten.mul.Tensor, b(aten.mul.Tensor, x, mask), 1 / (1 - probability))
    return kept, b(aten._to_copy.default, mask, dtype=torch.bool)


def embedding_dense_backward(
    b: Builder, grad: fx.Node, indices: fx.Node, rows: int, padding: int = -1, by_frequency: bool = False
) -> fx.Node | None:
    """The row of the padding index gets no gradient: mask it, so that the index need not be rebased on every rank."""
    if padding < 0:
        return None
    real = b(aten.unsqueeze.default, b(aten.ne.Scalar, indices, padding), value_of(indices).dim())
    masked = b(aten.mul.Tensor, grad, b(aten._to_copy.default, real, dtype=value_of(grad).dtype))
    return b(aten.embedding_dense_backward.default, masked, indices, rows, -1, by_frequency)


def nll_loss_forward(
    b: Builder, x: fx.Node, target: fx.Node, weight: fx.Node | None, reduction: int, ignore: int
) -> tuple[fx.Node, fx.Node] | None:
    """reduction: 0 none, 1 mean, 2 sum. The second result is the count of targets that are not ignored."""
    if weight is not None or value_of(x).dim() != 2:
        return None
    valid, index = _targets(b, target, ignore)
    picked = b(aten.squeeze.dim, b(aten.gather.default, x, 1, index), 1)
    real = b(aten._to_copy.default, valid, dtype=value_of(x).dtype)
    # where, not a product: an ignored target may sit on a log-probability of -inf
    losses = b(aten.neg.default, b(aten.where.self, valid, picked, b.zeros(x, value_of(picked).shape)))
    count = b(aten.sum.dim_IntList, real, [0], False)
    if reduction == 0:
        return losses, b.zeros(x, [])
    total = b(aten.sum.dim_IntList, losses, [0], False)
    return (b(aten.div.Tensor, total, count) if reduction == 1 else total), count


def nll_loss_backward(
    b: Builder, grad: fx.Node, x: fx.Node, target: fx.Node, weight: fx.Node | None, reduction: int, ignore: int, count: fx.Node
) -> fx.Node | None:  # fmt: skip
    if weight is not None or value_of(x).dim() != 2:
        return None
    valid, index = _targets(b, target, ignore)
    scaled = b(aten.div.Tensor, grad, count) if reduction == 1 else grad
    real = b(aten._to_copy.default, valid, dtype=value_of(x).dtype)
    rows = b(aten.neg.default, b(aten.mul.Tensor, real, scaled))
    shape = [int(n) for n in value_of(x).shape]
    return b(aten.scatter_add.default, b.zeros(x, shape), 1, index, b(aten.unsqueeze.default, rows, 1))


def _targets(b: Builder, target: fx.Node, ignore: int) -> tuple[fx.Node, fx.Node]:
    valid = b(aten.ne.Scalar, target, ignore)
    safe = b(aten.where.self, valid, target, b.zeros(target, value_of(target).shape))
    return valid, b(aten.unsqueeze.default, safe, 1)


def batch_norm(
    b: Builder, x: fx.Node, weight: fx.Node | None, bias: fx.Node | None, running_mean: fx.Node | None,
    running_var: fx.Node | None, training: bool, momentum: float, eps: float,
) -> tuple[fx.Node, ...]:  # fmt: skip
    """Ioffe and Szegedy 2015 over the global batch; results: output, mean, 1/deviation, new running mean and variance."""
    dims = [d for d in range(value_of(x).dim()) if d != 1]
    count = _count(x, dims)
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


def _blend(b: Builder, old: fx.Node, new: fx.Node, momentum: float) -> fx.Node:
    return b(aten.add.Tensor, b(aten.mul.Tensor, old, 1 - momentum), b(aten.mul.Tensor, new, momentum))


def _channelwise(b: Builder, vector: fx.Node, x: fx.Node) -> fx.Node:
    rank = value_of(x).dim()
    return b(aten.view.default, vector, [1, int(value_of(x).shape[1]), *[1] * (rank - 2)])


def batch_norm_backward(
    b: Builder, grad: fx.Node, x: fx.Node, weight: fx.Node | None, running_mean: fx.Node | None, running_var: fx.Node | None,
    saved_mean: fx.Node | None, saved_inverse: fx.Node | None, training: bool, eps: float, mask: Sequence[bool],
) -> tuple[fx.Node | None, ...]:  # fmt: skip
    dims = [d for d in range(value_of(x).dim()) if d != 1]
    count = _count(x, dims)
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


Decomposition = Callable[..., Any]
DECOMPOSITIONS: dict[Any, Decomposition] = {
    aten.mean.dim: mean,
    aten.mean.default: mean_all,
    aten.var.correction: var,
    aten.var_mean.correction: var_mean,
    aten.native_dropout.default: native_dropout,
    aten.embedding_dense_backward.default: embedding_dense_backward,
    aten.nll_loss_forward.default: nll_loss_forward,
    aten.nll_loss_backward.default: nll_loss_backward,
    aten._native_batch_norm_legit_functional.default: batch_norm,
    aten.native_batch_norm_backward.default: batch_norm_backward,
    aten._native_batch_norm_legit_no_training.default: lambda b, x, w, bias, mean_, var_, momentum, eps: batch_norm(
        b, x, w, bias, mean_, var_, False, momentum, eps
    )[:3],
}
