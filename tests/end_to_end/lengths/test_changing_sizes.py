"""Sizes that nobody named, and that change from call to call."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn

import shardc
from samples.odd_sizes import DIVIDES, Decoder, train, words


def test_new_lengths_in_training(traces: list[object]) -> None:
    torch.manual_seed(0)
    single, model = Decoder().double(), shardc.shard(Decoder().double(), mesh="dp=2,tp=2", hardware=DIVIDES)
    model.load_state_dict(single.state_dict())
    times: list[float] = []
    for length in (12, 16, 20, 24, 9, 13, 28, 5, 36):
        inputs = words(8, length)
        start = time.process_time()
        loss, gradients = train(model, inputs)
        times.append(time.process_time() - start)
        expected, right = train(single, inputs)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients, right, rtol=1e-10, atol=1e-10)
    assert len(traces) == 2
    assert "SIZES = " in model.code
    assert min(times[3:]) < 0.2


def test_backward_after_a_call_of_another_length() -> None:
    single = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    model = shardc.shard(copy.deepcopy(single), mesh="dp=2")
    calls = [torch.randn(length, 4).double() for length in (6, 8, 10, 12, 14)]
    for of in (single, model):
        torch.stack([of(x).sin().sum() for x in calls]).sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in single.parameters()])


def test_two_sizes_that_change_on_their_own(traces: list[object]) -> None:
    def scores(x: Tensor, y: Tensor) -> Tensor:
        return torch.softmax(x @ y.mT, -1).mean((0, 1)).sum() + x.flatten(0, 1).shape[0]

    sharded = shardc.shard(scores, mesh="dp=2")
    for one, other in ((4, 4), (6, 8), (8, 6), (10, 14), (14, 10), (5, 12), (7, 9), (12, 16), (16, 22)):
        x, y = torch.randn(2, one, 3), torch.randn(2, other, 3)
        torch.testing.assert_close(sharded(x, y), scores(x, y))
    assert len(traces) == 2


def test_sizes_that_were_equal_until_now(traces: list[object]) -> None:
    def sums(x: Tensor, y: Tensor, times: int) -> Tensor:
        return x.relu().sum() * times + y.sum()

    sharded = shardc.shard(sums, mesh="dp=2")
    for one, other, times in ((4, 4, 2), (6, 6, 2), (8, 10, 2), (12, 9, 2), (12, 9, 3)):
        x, y = torch.randn(one, 3), torch.randn(other, 3)
        torch.testing.assert_close(sharded(x, y, times), sums(x, y, times))
    assert len(traces) == 4  # alone, equal, not equal, and with another int


def test_sizes_that_the_code_asks_for(traces: list[object]) -> None:
    """Each side of the branch has a program; sizes that the code turns into numbers have one each."""

    def branches(x: Tensor) -> Tensor:
        return x.relu() if x.shape[0] > 9 else x.sigmoid()

    sharded = shardc.shard(branches, mesh="dp=2")
    for size in (4, 6, 8, 12, 14, 16, 7, 20):
        x = torch.randn(size, 3)
        torch.testing.assert_close(sharded(x), branches(x))

    def counted(x: Tensor) -> Tensor:
        return x.split(x.shape[0] // 2)[0] * torch.ones(int(x.shape[0]) // 2, 3)

    sharded = shardc.shard(counted, mesh="dp=2")
    for size in (4, 6, 8, 10, 12, 4):
        x = torch.randn(size, 3)
        torch.testing.assert_close(sharded(x), counted(x))


def test_a_size_that_is_returned() -> None:
    def mean(x: Tensor) -> tuple[Tensor, int]:
        return x.sum(0) / x.shape[0], x.shape[0] * 2

    sharded = shardc.shard(mean, mesh="dp=2")
    for size in (4, 6, 8, 10, 14):
        x = torch.randn(size, 3)
        result, twice = sharded(x)
        torch.testing.assert_close(result, x.mean(0))
        assert type(twice) is int
        assert twice == size * 2
