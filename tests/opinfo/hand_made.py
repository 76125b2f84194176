"""Sample calls with dims that split, for operators of which torch's own samples have batches of one or two."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Call:
    """The arguments of one sample call."""

    args: list[Any]
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])


_GENERATOR = torch.Generator()


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_GENERATOR).requires_grad_()


def _uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=_GENERATOR).requires_grad_()


def _index(below: int, *shape: int) -> Tensor:
    return torch.randint(0, below, shape, generator=_GENERATOR)


def _call(*args: Any, **kwargs: Any) -> Call:
    return Call(list(args), kwargs)


def hand_made(name: str) -> list[Call]:
    """The hand-made calls of one operator; the same values every time, whatever was made before."""
    _GENERATOR.manual_seed(11)
    for family in (_convolutions, _pools, _layers, _activations, _reductions, _products, _indexed, _shapes):
        found = family(name.removeprefix("nn.functional."), name.startswith("nn.functional."))
        if found:
            return found
    return []


def _convolutions(name: str, functional: bool) -> list[Call]:
    r = _normal
    match name:
        case "conv1d":
            return [_call(r(4, 8, 16), r(8, 8, 3), r(8), padding=1), _call(r(4, 8, 16), r(8, 8, 4), None, stride=4)]
        case "conv2d":
            return [
                _call(r(4, 8, 8, 16), r(8, 8, 3, 3), r(8), padding=1),
                _call(r(4, 8, 16, 16), r(8, 8, 4, 4), r(8), stride=4),
                _call(r(4, 8, 8, 8), r(8, 1, 3, 3), None, padding=1, groups=8),
            ]
        case "conv3d":
            return [_call(r(4, 4, 4, 8, 8), r(4, 4, 3, 3, 3), r(4), padding=1)]
        case "conv_transpose1d":
            return [_call(r(4, 8, 16), r(8, 8, 2), r(8), stride=2)]
        case "conv_transpose2d":
            return [_call(r(4, 8, 8, 8), r(8, 8, 2, 2), r(8), stride=2)]
        case "conv_transpose3d":
            return [_call(r(4, 4, 4, 4, 4), r(4, 4, 2, 2, 2), r(4), stride=2)]
        case "unfold" if functional:
            return [_call(r(4, 8, 8, 8), kernel_size=2)]
        case _:
            return []


def _pools(name: str, _: bool) -> list[Call]:
    r = _normal
    match name:
        case "max_pool1d" | "avg_pool1d":
            return [_call(r(4, 8, 16), kernel_size=2)]
        case "max_pool2d":
            return [_call(r(4, 8, 16, 16), kernel_size=3, stride=2, padding=1)]
        case "avg_pool2d":
            return [_call(r(4, 8, 16, 16), kernel_size=2)]
        case "max_pool3d" | "avg_pool3d":
            return [_call(r(4, 4, 8, 8, 8), kernel_size=2)]
        case "adaptive_avg_pool1d":
            return [_call(r(4, 8, 16), 4)]
        case "adaptive_avg_pool2d" | "adaptive_max_pool2d":
            return [_call(r(4, 8, 16, 16), (4, 4))]
        case "adaptive_avg_pool3d":
            return [_call(r(4, 4, 8, 8, 8), (2, 2, 2))]
        case "interpolate.nearest":
            return [_call(r(4, 8, 4, 4), scale_factor=2, mode="nearest")]
        case "interpolate.bilinear":
            return [_call(r(4, 8, 4, 4), scale_factor=2, mode="bilinear")]
        case "pixel_shuffle":
            return [_call(r(4, 8, 4, 4), 2)]
        case "pad.reflect":
            return [_call(r(4, 8, 8, 8), (1, 1, 1, 1), mode="reflect")]
        case "grid_sample":
            return [_call(r(4, 4, 8, 8), _uniform(4, 6, 6, 2))]
        case _:
            return []


def _layers(name: str, _: bool) -> list[Call]:
    r, i = _normal, _index
    match name:
        case "batch_norm":
            return [
                _call(r(8, 8, 4, 4), torch.zeros(8), torch.ones(8), r(8), r(8), training=training)
                for training in (True, False)
            ]
        case "group_norm":
            return [_call(r(4, 8, 4, 4), 4, r(8), r(8))]
        case "instance_norm":
            return [_call(r(4, 8, 4, 4))]
        case "layer_norm":
            return [_call(r(4, 8, 16), (16,), r(16), r(16))]
        case "rms_norm":
            return [_call(r(4, 8, 16), (16,), r(16))]
        case "scaled_dot_product_attention":
            return [
                _call(r(4, 4, 16, 8), r(4, 4, 16, 8), r(4, 4, 16, 8), is_causal=True),
                _call(r(4, 4, 16, 8), r(4, 4, 16, 8), r(4, 4, 16, 8)),
            ]
        case "embedding":
            return [_call(r(16, 8), i(16, 4, 8))]
        case "cross_entropy":
            return [_call(r(8, 16), i(16, 8)), _call(r(4, 8, 6), i(8, 4, 6), reduction="sum")]
        case "nll_loss":
            return [_call(r(8, 16), i(16, 8))]
        case "linear":
            return [_call(r(4, 8, 16), r(12, 16), r(12))]
        case "bilinear":
            return [_call(r(8, 4), r(8, 4), r(4, 4, 4), r(4))]
        case "one_hot":
            return [_call(i(8, 4, 4), 8)]
        case _:
            return []


def _activations(name: str, functional: bool) -> list[Call]:
    if not functional:
        return []
    if name == "glu":
        return [_call(_normal(8, 8), 1)]
    return [_call(_normal(8, 8))] if name in ("gelu", "silu", "hardswish") else []


def _reductions(name: str, functional: bool) -> list[Call]:
    r = _normal
    if functional:
        return []
    match name:
        case "sum" | "mean":
            return [_call(r(8, 12), 1), _call(r(8, 12), 0)]
        case "amax" | "var" | "std" | "prod" | "logsumexp" | "cumsum" | "sort":
            return [_call(r(8, 12), 0)]
        case "argmax":
            return [_call(r(8, 12), 0), _call(r(8, 12))]
        case "norm":
            return [_call(r(8, 12))]
        case "topk":
            return [_call(r(8, 12), 4, 0)]
        case "softmax":
            return [_call(r(8, 12), 0), _call(r(8, 12), 1)]
        case "log_softmax":
            return [_call(r(8, 12), 1)]
        case _:
            return []


def _products(name: str, functional: bool) -> list[Call]:
    r = _normal
    if functional:
        return []
    match name:
        case "bmm":
            return [_call(r(4, 8, 12), r(4, 12, 8))]
        case "mm":
            return [_call(r(8, 12), r(12, 16))]
        case "addmm":
            return [_call(r(8, 16), r(8, 12), r(12, 16))]
        case "einsum":
            return [_call([r(4, 8, 12), r(4, 12, 8)], "bij,bjk->bik")]
        case _:
            return []


def _indexed(name: str, functional: bool) -> list[Call]:
    r, i = _normal, _index
    if functional:
        return []
    match name:
        case "gather":
            return [_call(r(8, 12), 0, i(8, 8, 12))]
        case "scatter_add":
            return [_call(r(8, 12), 0, i(8, 8, 12), r(8, 12))]
        case "scatter_reduce.sum":
            return [_call(r(8, 12), 0, i(8, 8, 12), r(8, 12), reduce="sum")]
        case "index_select":
            return [_call(r(8, 12), 0, i(8, 4))]
        case "index_add":
            return [_call(r(8, 12), 0, i(8, 4), r(4, 12))]
        case "index_put":
            return [_call(r(8, 12), (i(8, 4),), r(4, 12), accumulate=True)]
        case "masked_fill":
            return [_call(r(8, 12), i(2, 8, 12).bool(), 1.0)]
        case "masked_scatter":
            return [_call(r(8, 12), i(2, 8, 12).bool(), r(8, 12))]
        case "searchsorted":
            return [_call(r(8, 12).detach().sort(1)[0], r(8, 4).detach())]
        case _:
            return []


def _shapes(name: str, functional: bool) -> list[Call]:
    r = _normal
    if functional:
        return []
    match name:
        case "tril" | "triu":
            return [_call(r(8, 8))]
        case "flip":
            return [_call(r(8, 12), [0])]
        case "roll":
            return [_call(r(8, 12), 1, 0)]
        case "cat":
            return [_call([r(8, 12), r(4, 12)], 0)]
        case "split":
            return [_call(r(8, 12), 4, 0)]
        case "unfold":
            return [_call(r(8, 12), 0, 4, 4)]
        case "repeat_interleave":
            return [_call(r(8, 12), 2, 0)]
        case "view":
            return [_call(r(8, 12), (4, 24))]
        case "reshape":
            return [_call(r(8, 12), (96,)), _call(r(4, 2, 12), (8, 12))]
        case _:
            return []
