"""Bernoulli numbers, and the words of the generator, from any place of their stream."""

from __future__ import annotations

import pytest
import torch

from shardc.runtime.kernels import bernoulli, mersenne
from shardc.runtime.kernels.bernoulli import Multiplicative, kind, state_of_draw

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.bool)


def moved(start: int) -> torch.Generator:
    """A generator that has given `start` words."""
    generator = torch.Generator().manual_seed(3)
    if start:
        torch.empty(start).uniform_(generator=generator)
    return generator


@pytest.mark.parametrize("start", [0, 1, 623, 624, 625, 1000])
def test_the_generator_goes_ahead(start: int) -> None:
    for words in (0, 1, 600, 623, 624, 625, 1248, 5000):
        generator = moved(start)
        state = generator.get_state()
        if words:
            torch.empty(words).uniform_(generator=generator)
        assert torch.equal(mersenne.ahead(state, words), generator.get_state()), words


@pytest.mark.parametrize(("start", "words"), [(0, 30_000), (10, 30_001), (700, 1 << 20)])
def test_the_generator_goes_far_ahead(monkeypatch: pytest.MonkeyPatch, start: int, words: int) -> None:
    monkeypatch.setattr(mersenne, "FAR", 1000)
    generator = moved(start)
    state = generator.get_state()
    torch.empty(words).uniform_(generator=generator)
    assert torch.equal(mersenne.ahead(state, words), generator.get_state())


def test_going_far_twice_is_going_twice_as_far() -> None:
    far, state = 3**30, moved(5).get_state()
    assert torch.equal(mersenne.ahead(mersenne.ahead(state, far), far), mersenne.ahead(state, 2 * far))


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_from_any_place(dtype: torch.dtype) -> None:
    """Whatever way of drawing this processor has, it is known."""
    assert kind() is not bernoulli.Unknown
    generator = moved(7)
    state = generator.get_state()
    drawn = torch.empty(5000, dtype=dtype).bernoulli_(0.7, generator=generator).bool()
    numbers = kind()(state, 0.7, dtype, 5000)
    for place, count in ((0, 10), (4000, 1000), (17, 3000), (3017, 5), (4999, 1), (0, 0)):
        assert torch.equal(numbers.take(place, count), drawn[place : place + count])
    again = moved(7)
    assert torch.equal(state_of_draw(again, (50, 100), dtype), state)
    assert torch.equal(again.get_state(), generator.get_state())


def test_the_stream_of_mkl() -> None:
    """The numbers that MKL 2026.2 gives for seed 2357136044, the first word after `manual_seed(0)`: `vslNewStream` with
    VSL_BRNG_MCG31, then `viRngBernoulli` with probability 0.3."""
    numbers = Multiplicative(torch.Generator().manual_seed(0).get_state(), 0.3, torch.float32, 1 << 22)
    assert (
        "".join(map(str, numbers.take(0, 64).int().tolist()))
        == "1001000110100100010000011110000100000010001110100111100000000000"
    )
    assert (
        "".join(map(str, numbers.take(3_000_000, 64).int().tolist()))
        == "1010010110100010001000000010000001000001001000100100000101100000"
    )
    whole = numbers.take(1_048_000, 2000)
    assert torch.equal(whole[900:], numbers.take(1_048_900, 1100))
