"""Dropout inside attention: which weights stay, from what the random stream gave once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__: list[str] = []


def kept(draw: Tensor, shape: tuple[int, ...], dropout: float) -> Tensor:
    """The factor of each weight of the whole scores: zero, or what makes up for those dropped."""
    generator = torch.Generator().manual_seed(int(draw[0]))
    chosen = torch.empty(shape, dtype=torch.float64).bernoulli_(1 - dropout, generator=generator)
    return (chosen / (1 - dropout)).to(draw.device)
