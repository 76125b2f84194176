"""Bernoulli numbers as torch draws them on the CPU, from any place of their stream."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__: list[str] = []

STATE = 5056
"""Bytes in the state of a generator of the CPU."""

BLOCK = 1 << 20


class Bernoulli:
    """The numbers that `bernoulli_(probability)` draws into a tensor of `dtype`, from a generator in `state`."""

    def __init__(self, state: Tensor, probability: float, dtype: torch.dtype) -> None:
        self._state, self._probability = state.cpu(), probability
        self._generator = torch.Generator()
        self._generator.set_state(self._state)
        self._place = 0

    def take(self, place: int, count: int) -> Tensor:
        """Numbers `place` to `place + count - 1`; booleans."""
        if place < self._place:
            self._generator.set_state(self._state)
            self._place = 0
        while self._place < place:
            self._draw(min(BLOCK, place - self._place))
        return self._draw(count)

    def _draw(self, count: int) -> Tensor:
        self._place += count
        return torch.empty(count, dtype=torch.bool).bernoulli_(self._probability, generator=self._generator)


def state_of_draw(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The state of the generator, which then goes on as if it drew Bernoulli numbers of `shape` and `dtype`."""
    state, left = generator.get_state(), math.prod(shape)
    while left > 0:
        torch.empty(min(BLOCK, left), dtype=torch.bool).bernoulli_(generator=generator)
        left -= BLOCK
    return state
