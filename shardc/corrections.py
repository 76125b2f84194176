"""Where a trace by torch computes something else than eager mode does, or stops without need: put right meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._C import DispatchKey
from torch._decomp import decompositions as rnn
from torch._ops import OpOverload

aten = torch.ops.aten


@contextmanager
def corrected() -> Generator[None]:
    """Trace in here; everything is set back at the end."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(rnn, "_rnn_helper", _recurrent_layers))
        # The comparison of a mask with the causal one branches on values; the mask itself says the same.
        stack.enter_context(patch.object(nn.modules.transformer, "_detect_is_causal_mask", _is_causal))
        stack.enter_context(_whole(aten.multilabel_margin_loss_forward.default))
        yield


@contextmanager
def _whole(operator: OpOverload) -> Generator[None]:
    """Not decomposed: torch's decomposition of this one counts labels that are not there."""
    kernel = operator.py_kernels.pop(DispatchKey.Autograd)
    operator._dispatch_cache.clear()
    try:
        yield
    finally:
        operator.py_kernels[DispatchKey.Autograd] = kernel
        operator._dispatch_cache.clear()


def _is_causal(mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


def _recurrent_layers(
    x: torch.Tensor, hidden: Any, params: Any, has_biases: bool, layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool, layer: Callable[..., Any],
) -> tuple[torch.Tensor, list[Any]]:  # fmt: skip
    """torch's decomposition of LSTM, GRU and RNN, which forgets the dropout between the layers."""
    x = x.transpose(0, 1) if batch_first else x
    final: list[Any] = []
    for index in range(layers):
        own, state, back, back_state = rnn.params_hiddens(params, hidden, index, bidirectional)
        made, last = layer(x, state, own, has_biases)
        final.append(last)
        if bidirectional:
            backwards, last = layer(x, back_state, back, has_biases, reverse=True)
            final.append(last)
            made = torch.cat([made, backwards], -1)
        x = torch.dropout(made, dropout, train) if train and dropout and index < layers - 1 else made
    return x.transpose(0, 1) if batch_first else x, final


def _random(x: torch.Tensor, *bounds: int | None, **kwargs: Any) -> torch.Tensor:
    """The overload with two bounds is called "from", which no traced code can spell."""
    if len(bounds) == 2 and bounds[0] is not None and bounds[1] is not None:
        return torch.Tensor.random_(x, bounds[1] - bounds[0], **kwargs).add_(bounds[0])
    return torch.Tensor.random_(x, *bounds, **kwargs)


def _bernoulli(x: torch.Tensor, *chance: float, **kwargs: Any) -> torch.Tensor:
    """With a number as chance this draws in logical order, and the method in place in the order of memory; ATen has
    one operator for both."""
    if not chance and "p" not in kwargs:
        return torch.bernoulli(x, **kwargs)
    return torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(*chance, **kwargs)


RESPELLED: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.Tensor.random_: _random,
    torch.bernoulli: _bernoulli,
    torch.Tensor.bernoulli: _bernoulli,
}


"""Functions of torch, and what is called in their place."""
