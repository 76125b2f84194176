"""A few steps of training, alike for a model and for what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def losses_of(
    call: Callable[..., Tensor], inputs: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> list[float]:
    """The losses of three steps, of which `call` computes one from the inputs."""
    losses: list[float] = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = call(**inputs)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
