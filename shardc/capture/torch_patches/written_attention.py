"""Attention that a model writes out, as the one operator.

    scores = q @ k.mT * scale + mask        notes on the results: Scores, Scores, Scores,
    weights = F.softmax(scores, -1)         Weights,
    weights = F.dropout(weights, 0.1)       Weights
    out = weights @ v                ->     %out, %lse = shardc.attention(%q, %k, %v, %mask, ...)

What the notes describe is traced as it is written, too. Where nothing else reads it, it is dead code. Weights that
something reads go through `shardc::attention_weights`, so capture sees it, and traces the model again without notes at
that line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardc.capture.torch_patches.attention import Options, attended, unrepeated
from shardc.capture.torch_patches.autocast import lowered
from shardc.capture.torch_patches.tensor_notes import Expanded, Notes
from shardc.capture.torch_patches.written_scores import Number, Scores, Sinks, note_scores
from shardc.runtime.kernels.attention import attention_draw


@dataclass(frozen=True)
class Weights:
    """The softmax of scores, after dropout. `joined`: the column of the sinks still stands at the end of each row."""

    scores: Scores
    shape: tuple[int, ...]
    joined: bool
    site: int
    draw: Tensor | None = None
    dropout: float = 0.0


@torch.library.custom_op("shardc::attention_weights", mutates_args=())
def attention_weights(weights: Tensor, draw: Tensor | None, dropout: float, site: int) -> Tensor:
    """The weights after dropout. It stands in traces only: it marks the weights of recognised attention."""
    return weights.clone()


@attention_weights.register_fake
def _(weights: Tensor, draw: Tensor | None, dropout: float, site: int) -> Tensor:
    return torch.empty_like(weights)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.draw, ctx.dropout, ctx.site = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return attention_weights(grad, ctx.draw, ctx.dropout, ctx.site), None, None, None


attention_weights.register_autograd(_backward, setup_context=_setup)
