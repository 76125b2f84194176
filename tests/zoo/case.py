"""What a model of the zoo is, and the wrappers that give every family one scalar loss in the model's own dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Built = tuple[nn.Module, Inputs]

BATCH, LENGTH, WIDTH, HEADS, INNER, WORDS, CLASSES = 4, 8, 32, 4, 64, 48, 8
DTYPE = torch.float64
EXACT = 1e-10
ROUNDED = 2e-5
"""For models that compute a part of themselves in float32, whatever their dtype."""


@dataclass(frozen=True)
class Entry:
    """A model with random weights and its inputs, and how near to single device it must come."""

    build: Callable[[], Built]
    tolerance: float = EXACT


class Loss(nn.Module):
    """A model's output, weighed, or its logits against `labels` (transformers' own losses round to float32)."""

    def __init__(self, model: nn.Module, output: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Tensor:
        made = self.model(**inputs)
        made = made if self.output is None else getattr(made, self.output)
        if labels is None:
            return weighed(made)
        return F.cross_entropy(made.flatten(0, labels.dim() - 1), labels.flatten())


def weighed(x: Tensor) -> Tensor:
    """A scalar in which every element of `x` counts differently, linearly and squared."""
    weights = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape)
    return (weights * (x + x * x / 2)).mean()


def in_own_dtype(model: nn.Module) -> nn.Module:
    """transformers' RMSNorms sum in float32 in models of any dtype: no split of that sum could agree to 1e-10."""
    for part in model.modules():
        if "RMSNorm" in type(part).__name__ and hasattr(part, "variance_epsilon"):
            part.forward = MethodType(_rms_norm, part)
    return model


def _rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def words(*shape: int, high: int = WORDS, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape or (BATCH, LENGTH))


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE)
