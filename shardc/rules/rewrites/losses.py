"""Losses as elementwise operators, sums, and a division by the global number of elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from shardc.ir.program import value_of
from shardc.rules.rewrites.builder import Builder

aten = torch.ops.aten
NONE, MEAN = 0, 1
"""The reductions, as torch numbers them; 2 is the sum."""


def _reduced(b: Builder, values: fx.Node, reduction: int) -> fx.Node:
    if reduction == NONE:
        return values
    total = b(aten.sum.dim_IntList, b.wide(values), list(range(value_of(values).dim())), False)
    return b(aten.div.Tensor, total, value_of(values).numel()) if reduction == MEAN else total


def _spread(b: Builder, grad: fx.Node, values: fx.Node, reduction: int) -> fx.Node:
    """The gradient of each element of `values`, from that of the reduced loss."""
    return b(aten.div.Tensor, grad, value_of(values).numel()) if reduction == MEAN else grad


def mse(b: Builder, x: fx.Node, target: fx.Node, reduction: int = MEAN) -> fx.Node:
    """(x - target)²."""
    offset = b(aten.sub.Tensor, x, target)
    return _reduced(b, b(aten.mul.Tensor, offset, offset), reduction)


def mse_backward(b: Builder, grad: fx.Node, x: fx.Node, target: fx.Node, reduction: int) -> fx.Node:
    """2 (x - target)."""
    offset = b(aten.sub.Tensor, x, target)
    return b(aten.mul.Tensor, b(aten.mul.Tensor, offset, 2), _spread(b, grad, offset, reduction))


def smooth_l1(b: Builder, x: fx.Node, target: fx.Node, reduction: int = MEAN, beta: float = 1.0) -> fx.Node:
    """The Huber loss divided by beta; with beta 0, the absolute error (Girshick 2015, equation 3)."""
    size = b(aten.abs.default, b(aten.sub.Tensor, x, target))
    if beta == 0:
        return _reduced(b, size, reduction)
    near = b(aten.mul.Tensor, b(aten.mul.Tensor, size, size), 0.5 / beta)
    far = b(aten.sub.Tensor, size, 0.5 * beta)
    return _reduced(b, b(aten.where.self, b(aten.lt.Scalar, size, beta), near, far), reduction)


def smooth_l1_backward(b: Builder, grad: fx.Node, x: fx.Node, target: fx.Node, reduction: int, beta: float) -> fx.Node:
    offset = b(aten.sub.Tensor, x, target)
    slope = b(aten.sign.default, offset)
    if beta:
        near = b(aten.lt.Scalar, b(aten.abs.default, offset), beta)
        slope = b(aten.where.self, near, b(aten.div.Tensor, offset, beta), slope)
    return b(aten.mul.Tensor, slope, _spread(b, grad, offset, reduction))


def huber(b: Builder, x: fx.Node, target: fx.Node, reduction: int = MEAN, delta: float = 1.0) -> fx.Node:
    """Half the squared error up to `delta`, and linear beyond (Huber 1964)."""
    size = b(aten.abs.default, b(aten.sub.Tensor, x, target))
    near = b(aten.mul.Tensor, b(aten.mul.Tensor, size, size), 0.5)
    far = b(aten.mul.Tensor, b(aten.sub.Tensor, size, 0.5 * delta), delta)
    return _reduced(b, b(aten.where.self, b(aten.le.Scalar, size, delta), near, far), reduction)


def huber_backward(b: Builder, grad: fx.Node, x: fx.Node, target: fx.Node, reduction: int, delta: float) -> fx.Node:
    offset = b(aten.sub.Tensor, x, target)
    return b(aten.mul.Tensor, b(aten.clamp.default, offset, -delta, delta), _spread(b, grad, offset, reduction))


def bce(b: Builder, x: fx.Node, target: fx.Node, weight: fx.Node | None = None, reduction: int = MEAN) -> fx.Node:
    """Logarithms are clamped at -100, as in torch, so that the loss of a certain but wrong answer is finite."""
    yes = b(aten.clamp_min.default, b(aten.log.default, x), -100)
    no = b(aten.clamp_min.default, b(aten.log1p.default, b(aten.neg.default, x)), -100)
    # (target - 1) * no - target * yes
    values = b(aten.mul.Tensor, b(aten.sub.Tensor, target, 1), no)
    values = b(aten.sub.Tensor, values, b(aten.mul.Tensor, target, yes))
    return _reduced(b, values if weight is None else b(aten.mul.Tensor, values, weight), reduction)


def bce_backward(
    b: Builder, grad: fx.Node, x: fx.Node, target: fx.Node, weight: fx.Node | None = None, reduction: int = MEAN
) -> fx.Node:
    spread = b(aten.clamp_min.default, b(aten.mul.Tensor, x, b(aten.rsub.Scalar, x, 1)), 1e-12)
    slope = b(aten.div.Tensor, b(aten.sub.Tensor, x, target), spread)
    if weight is not None:
        slope = b(aten.mul.Tensor, slope, weight)
    return b(aten.mul.Tensor, slope, _spread(b, grad, slope, reduction))


def bce_logits(
    b: Builder, x: fx.Node, target: fx.Node, weight: fx.Node | None = None, positive: fx.Node | None = None,
    reduction: int = MEAN,
) -> fx.Node:  # fmt: skip
    """(1 - target) x + log_weight (log(1 + exp(-|x|)) + max(-x, 0)), with log_weight = 1 + (positive - 1) target."""
    tail = b(aten.log1p.default, b(aten.exp.default, b(aten.neg.default, b(aten.abs.default, x))))
    tail = b(aten.add.Tensor, tail, b(aten.clamp_min.default, b(aten.neg.default, x), 0))
    if positive is not None:
        scale = b(aten.add.Tensor, b(aten.mul.Tensor, b(aten.sub.Tensor, positive, 1), target), 1)
        tail = b(aten.mul.Tensor, tail, scale)
    values = b(aten.add.Tensor, b(aten.mul.Tensor, b(aten.rsub.Scalar, target, 1), x), tail)
    return _reduced(b, values if weight is None else b(aten.mul.Tensor, values, weight), reduction)


def nll(
    b: Builder, x: fx.Node, target: fx.Node, weight: fx.Node | None, reduction: int, ignore: int
) -> tuple[fx.Node, fx.Node]:
    """The second result is the total weight of targets that are not ignored; 0 without a reduction."""
    single = value_of(x).dim() == 1
    if single:
        x, target = b(aten.unsqueeze.default, x, 0), b(aten.view.default, target, [1])
    valid, index = _targets(b, target, ignore)
    picked = b(aten.squeeze.dim, b(aten.gather.default, x, 1, index), 1)
    real = _real(b, x, target, valid, weight)
    zeros = b.zeros(x, value_of(picked).shape)
    # a product would give NaN where an ignored target has a log-probability of -inf
    losses = b(aten.neg.default, b(aten.where.self, valid, picked, zeros))
    if weight is not None:
        losses = b(aten.mul.Tensor, losses, real)
    if reduction == NONE:
        return b(aten.view.default, losses, []) if single else losses, b.zeros(x, [])
    every = list(range(value_of(losses).dim()))
    total, count = (b(aten.sum.dim_IntList, b.wide(t), every, False) for t in (losses, real))
    return (b(aten.div.Tensor, total, count) if reduction == MEAN else total), count


def nll_backward(
    b: Builder, grad: fx.Node, x: fx.Node, target: fx.Node, weight: fx.Node | None, reduction: int, ignore: int,
    count: fx.Node,
) -> fx.Node:  # fmt: skip
    single = value_of(x).dim() == 1
    if single:
        x, target = b(aten.unsqueeze.default, x, 0), b(aten.view.default, target, [1])
    valid, index = _targets(b, target, ignore)
    scaled = b(aten.neg.default, b(aten.div.Tensor, grad, count) if reduction == MEAN else grad)
    if single and reduction == NONE:
        scaled = b(aten.view.default, scaled, [1])
    if weight is not None:
        scaled = b(aten.mul.Tensor, _real(b, x, target, valid, weight), scaled)
    # a product would give NaN where every target is ignored, because the mean divides by zero
    rows = b(aten.where.self, valid, scaled, b.zeros(x, value_of(target).shape))
    shape = [int(n) for n in value_of(x).shape]
    rows = b.cast(b(aten.unsqueeze.default, rows, 1), value_of(x).dtype)
    result = b(aten.scatter_add.default, b.zeros(x, shape), 1, index, rows)
    return b(aten.view.default, result, shape[1:]) if single else result


def _targets(b: Builder, target: fx.Node, ignore: int) -> tuple[fx.Node, fx.Node]:
    """A mask of the targets that count, and the targets as indices along the class dim, with 0 for ignored ones."""
    valid = b(aten.ne.Scalar, target, ignore)
    safe = b(aten.where.self, valid, target, b.zeros(target, value_of(target).shape))
    return valid, b(aten.unsqueeze.default, safe, 1)


def _real(b: Builder, x: fx.Node, target: fx.Node, valid: fx.Node, weight: fx.Node | None) -> fx.Node:
    """The weight of every target, 0 where it is ignored."""
    if weight is None:
        return b(aten._to_copy.default, valid, dtype=value_of(x).dtype)
    zeros = b.zeros(target, value_of(target).shape)
    weights = b(aten.index.Tensor, weight, [b(aten.where.self, valid, target, zeros)])
    return b(aten.where.self, valid, weights, b.zeros(weight, value_of(target).shape))


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    aten.mse_loss.default: mse,
    aten.mse_loss_backward.default: mse_backward,
    aten.smooth_l1_loss.default: smooth_l1,
    aten.smooth_l1_loss_backward.default: smooth_l1_backward,
    aten.huber_loss.default: huber,
    aten.huber_loss_backward.default: huber_backward,
    aten.binary_cross_entropy.default: bce,
    aten.binary_cross_entropy_backward.default: bce_backward,
    aten.binary_cross_entropy_with_logits.default: bce_logits,
    aten.nll_loss_forward.default: nll,
    aten.nll_loss_backward.default: nll_backward,
    aten.nll_loss2d_forward.default: nll,
    aten.nll_loss2d_backward.default: nll_backward,
}
