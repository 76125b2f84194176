"""A linear layer and whatever a test wants after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """A linear layer, then whatever the test wants."""

    def __init__(self, then: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(4))
        self.then = then

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.then(self, self.inner(x), *args, **kwargs)


X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
