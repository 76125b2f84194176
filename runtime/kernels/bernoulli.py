"""Bernoulli numbers as torch draws them on the CPU, from any place of their stream.

Where torch draws with MKL, which it does on processors of Intel, the generator gives one seed, and MKL's stream MCG31m1
the numbers: x' = 1132489760 x mod (2^31 - 1). Elsewhere the generator gives two words for every number. Which of them
this torch does is found by trying both. Source of MCG31m1: Intel, "Notes for oneMKL vector statistics", basic
generators; how it rounds was found by experiment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from shardc.runtime.kernels.mersenne import ahead

__all__: list[str] = []

BLOCK = 1 << 20
"""Numbers that are drawn at a time."""

_MODULUS, _FACTOR, _WORDS = 2**31 - 1, 1132489760, 2


class Numbers(Protocol):
    """The `total` numbers that `bernoulli_(probability)` draws into a tensor of `dtype`, its generator at `state`."""

    def __init__(self, state: Tensor, probability: float, dtype: torch.dtype, total: int) -> None: ...

    def take(self, place: int, count: int) -> Tensor:
        """Numbers `place` to `place + count - 1`; booleans."""
        ...

    def after(self) -> Tensor:
        """The state of the generator when all numbers are drawn."""
        ...


class Words(Numbers):
    """Numbers for each of which the generator gives two words."""

    def __init__(self, state: Tensor, probability: float, dtype: torch.dtype, total: int) -> None:
        self._state, self._probability, self._total = state, probability, total
        self._generator, self._place = torch.Generator(), 0
        self._generator.set_state(state)

    def take(self, place: int, count: int) -> Tensor:
        if place < self._place:
            self._generator.set_state(self._state)
            self._place = 0
        if place > self._place:
            self._generator.set_state(ahead(self._generator.get_state(), (place - self._place) * _WORDS))
        self._place = place + count
        return torch.empty(count, dtype=torch.bool).bernoulli_(self._probability, generator=self._generator)

    def after(self) -> Tensor:
        return ahead(self._state, self._total * _WORDS)


class Multiplicative(Numbers):
    """Numbers that MKL draws from a seed, for which the generator gives one word; two for float64, the second of which
    counts."""

    def __init__(self, state: Tensor, probability: float, dtype: torch.dtype, total: int) -> None:
        generator = torch.Generator()
        generator.set_state(state)
        words = int(torch.empty(1, dtype=torch.int64).random_(-(2**63), None, generator=generator))
        seed = words & 0xFFFFFFFF if dtype == torch.float64 else words >> 32 & 0xFFFFFFFF
        self._state, self._dtype, self._total = state, dtype, total
        self._first = seed % _MODULUS or 1
        self._probability = torch.tensor(probability, dtype=torch.float32)

    def take(self, place: int, count: int) -> Tensor:
        made = torch.empty(count, dtype=torch.bool)
        for start in range(0, count, BLOCK):
            first = self._first * pow(_FACTOR, place + start, _MODULUS) % _MODULUS
            numbers = _powers()[: count - start] * first % _MODULUS
            made[start : start + BLOCK] = numbers.float().mul_(2.0**-31) < self._probability
        return made

    def after(self) -> Tensor:
        return ahead(self._state, (2 if self._dtype == torch.float64 else 1) if self._total else 0)


class Unknown(Numbers):
    """Numbers of a torch that draws in another way: they are drawn all at once."""

    def __init__(self, state: Tensor, probability: float, dtype: torch.dtype, total: int) -> None:
        self._generator = torch.Generator()
        self._generator.set_state(state)
        self._all = torch.empty(total, dtype=dtype).bernoulli_(probability, generator=self._generator).bool()

    def take(self, place: int, count: int) -> Tensor:
        return self._all[place : place + count]

    def after(self) -> Tensor:
        return self._generator.get_state()


@cache
def _powers() -> Tensor:
    """The first powers of the factor, `[BLOCK]`."""
    powers = torch.ones(1, dtype=torch.int64)
    while len(powers) < BLOCK:
        powers = torch.cat([powers, powers * pow(_FACTOR, len(powers), _MODULUS) % _MODULUS])
    return powers


@cache
def kind() -> type[Numbers]:
    """How this torch draws Bernoulli numbers on this processor."""
    for one in (Words, Multiplicative):
        if all(_draws_so(one, dtype) for dtype in (torch.float32, torch.float64)):
            return one
    return Unknown


def _draws_so(one: type[Numbers], dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    drawn = torch.empty(5000, dtype=dtype).bernoulli_(0.3, generator=generator).bool()
    numbers = one(state, 0.3, dtype, 5000)
    same = torch.equal(drawn[2000:], numbers.take(2000, 3000)) and torch.equal(drawn[:100], numbers.take(0, 100))
    return same and torch.equal(generator.get_state(), numbers.after())


@cache
def in_memory_order() -> bool:
    """Whether torch draws into a tensor in the order of its memory; if not, in that of its indices."""
    seed, x = torch.Generator().manual_seed(0), torch.empty(50, 70)
    x.t().bernoulli_(0.5, generator=seed)
    numbers = kind()(torch.Generator().manual_seed(0).get_state(), 0.5, x.dtype, x.numel())
    return torch.equal(numbers.take(0, x.numel()).view(x.shape), x.bool())


def state_of_draw(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The state of the generator, which then goes on as if it drew Bernoulli numbers of `shape` and `dtype`."""
    state = generator.get_state()
    generator.set_state(kind()(state, 0.5, dtype, math.prod(shape)).after())
    return state
