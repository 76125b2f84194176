"""Patches for a trace: where torch's tracer computes something else than eager mode, or stops without need.

y = torch.bernoulli(x, 0.3)     # a trace draws in the order of memory; the patch draws as eager mode does
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch._C import DispatchKey
from torch._decomp import decompositions as rnn
from torch._ops import OpOverload

from shardc.capture.torch_patches import data_dependent, distributions
from shardc.capture.torch_patches.autocast import lowered, off
from shardc.errors import CaptureError

aten = torch.ops.aten


@contextmanager
def patched() -> Generator[None]:
    """Trace in here. At the end every patch is taken back."""
    with ExitStack() as stack:
        # torch registers its decompositions of recurrent layers with this helper inside, and has no other handle on it.
        stack.enter_context(patch.object(rnn, "_rnn_helper", _recurrent_layers))
        # torch compares a mask with the causal one, and branches on the outcome. The mask gives the same result.
        stack.enter_context(patch.object(nn.modules.transformer, "_detect_is_causal_mask", _is_causal))
        # Under autograd, a parameter that forward writes would need the gradient of what it becomes.
        stack.enter_context(patch.object(F, "_no_grad_embedding_renorm_", _renormalise))
        stack.enter_context(distributions.unchecked())
        stack.enter_context(_whole(aten.multilabel_margin_loss_forward.default))
        yield


@contextmanager
def _whole(operator: OpOverload) -> Generator[None]:
    """Trace `operator` as it is: torch's decomposition of it counts labels that are not there.

    AOTAutograd decomposes what has a Python kernel under Autograd, whatever table of decompositions it is given. So the
    kernel is taken out, and the cache of dispatched kernels emptied, before and after.
    """
    kernel = operator.py_kernels.pop(DispatchKey.Autograd)
    operator._dispatch_cache.clear()
    try:
        yield
    finally:
        operator.py_kernels[DispatchKey.Autograd] = kernel
        operator._dispatch_cache.clear()


def _renormalise(weight: torch.Tensor, index: torch.Tensor, max_norm: float, norm_type: float) -> None:
    if weight.requires_grad and torch.is_grad_enabled():
        raise CaptureError(
            "an embedding with max_norm rewrites its weight, which is trained, in forward, and a sharded program does "
            "not: leave out max_norm, and clip the rows after each step of the optimizer, under torch.no_grad(), with "
            "weight.copy_(torch.renorm(weight, norm_type, 0, max_norm))"
        )
    torch.embedding_renorm_(weight.detach(), index, max_norm, norm_type)


def _is_causal(mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


def _recurrent_layers(
    x: torch.Tensor, hidden: Any, params: Any, has_biases: bool, layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool, layer: Callable[..., Any],
) -> tuple[torch.Tensor, list[Any]]:  # fmt: skip
    """torch's decomposition of LSTM, GRU and RNN, which forgets the dropout between the layers.

    Where eager mode runs LSTM as one operator, that is on autocast's list for lower precision.
    """
    if layer is rnn.one_layer_lstm and all(h.shape[-1] == c.shape[-1] for h, c in hidden):
        x, params = lowered(x), [tuple(map(lowered, of_layer)) for of_layer in params]
        hidden = [(lowered(h), lowered(c)) for h, c in hidden]
        with off():
            return _layers(x, hidden, params, has_biases, layers, dropout, train, bidirectional, batch_first, layer)
    return _layers(x, hidden, params, has_biases, layers, dropout, train, bidirectional, batch_first, layer)


def _layers(
    x: torch.Tensor, hidden: Any, params: Any, has_biases: bool, layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool, layer: Callable[..., Any],
) -> tuple[torch.Tensor, list[Any]]:  # fmt: skip
    x = x.transpose(0, 1) if batch_first else x
    final: list[Any] = []
    for index in range(layers):
        layer_params, state, back_params, back_state = rnn.params_hiddens(params, hidden, index, bidirectional)
        output, last = layer(x, state, layer_params, has_biases)
        final.append(last)
        if bidirectional:
            backwards, last = layer(x, back_state, back_params, has_biases, reverse=True)
            final.append(last)
            output = torch.cat([output, backwards], -1)
        x = torch.dropout(output, dropout, train) if train and dropout and index < layers - 1 else output
    return x.transpose(0, 1) if batch_first else x, final


def _random(x: torch.Tensor, *bounds: int | None, **kwargs: Any) -> torch.Tensor:
    """torch calls the overload with two bounds "from", a keyword of Python, so generated code cannot call it."""
    if len(bounds) == 2 and bounds[0] is not None and bounds[1] is not None:
        return torch.Tensor.random_(x, bounds[1] - bounds[0], **kwargs).add_(bounds[0])
    return torch.Tensor.random_(x, *bounds, **kwargs)


def _bernoulli(x: torch.Tensor, *chance: float, **kwargs: Any) -> torch.Tensor:
    """With a number as chance, torch.bernoulli draws in logical order, and bernoulli_ in the order of memory. ATen has
    one operator for both, so the draw is made into a contiguous tensor."""
    if not chance and "p" not in kwargs:
        return torch.bernoulli(x, **kwargs)
    return torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(*chance, **kwargs)


def _where(x: torch.Tensor, key: Any, value: Any, accumulate: bool = False) -> torch.Tensor | None:
    """`x` with `value` where a mask is true; None if `key` is no mask, or `value` has one element per true element.

    `value` is one number, or one per element of the dims after the mask's. Autograd's formula for such a write counts
    the elements that were written, and their number is only known when the program runs.
    """
    mask = key[0] if isinstance(key, (tuple, list)) and len(key) == 1 else key
    if not (isinstance(mask, torch.Tensor) and mask.dtype is torch.bool and isinstance(value, torch.Tensor)):
        return None
    extra = value.dim() - (x.dim() - mask.dim())
    if extra > 0:
        if any(size != 1 for size in value.shape[:extra]):
            return None
        value = value.reshape(value.shape[extra:])
    value = value.to(x.dtype)
    mask = mask.reshape([*mask.shape, *[1] * (x.dim() - mask.dim())])
    return torch.where(mask, x + value if accumulate else value, x)


def _assign(x: torch.Tensor, key: Any, value: Any) -> None:
    written = _where(x, key, value)
    if written is None:
        torch.Tensor.__setitem__(x, key, value)
    else:
        x.copy_(written)


def _put(x: torch.Tensor, indices: Any, values: torch.Tensor, accumulate: bool = False) -> torch.Tensor:
    written = _where(x, indices, values, accumulate)
    return torch.index_put(x, indices, values, accumulate) if written is None else written


def _put_in_place(x: torch.Tensor, indices: Any, values: torch.Tensor, accumulate: bool = False) -> torch.Tensor:
    written = _where(x, indices, values, accumulate)
    return x.index_put_(indices, values, accumulate) if written is None else x.copy_(written)


def _fill(x: torch.Tensor, dim: int, index: torch.Tensor, value: Any) -> torch.Tensor:
    """Autograd's formula for a value that is a tensor counts the different indices in `index`, which a trace cannot."""
    if not isinstance(value, torch.Tensor) or not x.dim():
        return torch.index_fill(x, dim, index, value)
    marked = torch.zeros(x.shape[dim], dtype=torch.bool, device=x.device).index_fill(0, index, True)
    mask = marked.reshape([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])
    return torch.where(mask, value.to(x.dtype), x)


def set_data(x: torch.Tensor, value: torch.Tensor) -> None:
    """`x.data = value`, which a trace would not see, as a write in place. What was computed from `x` before keeps its
    value either way."""
    if x.shape != value.shape or x.dtype != value.dtype:
        raise CaptureError(
            f"forward sets .data of a tensor of shape {tuple(x.shape)} and {x.dtype} to one of shape "
            f"{tuple(value.shape)} and {value.dtype}: a sharded tensor keeps its shape and dtype"
        )
    with torch.no_grad():
        x.copy_(value)


PATCHES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.Tensor.random_: _random,
    torch.bernoulli: _bernoulli,
    torch.Tensor.bernoulli: _bernoulli,
    torch.Tensor.__setitem__: _assign,
    torch.index_put: _put,
    torch.Tensor.index_put: _put,
    torch.Tensor.index_put_: _put_in_place,
    torch.index_fill: _fill,
    torch.Tensor.index_fill: _fill,
    **data_dependent.PATCHES,
}
"""Functions of torch, and what `Provenance` calls in their place."""
