"""Values of the model's own small tensors that code asks for: which calls a program is for, and what is not known."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardc import ShardcError, shard


class Counts(nn.Module):
    """Asks for the number of rows that it has seen."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.shape[0])
        return self.up(x) * (2 if self.seen > 10 else 1)


def test_sizes_that_change_are_those_of_the_call() -> None:
    single = Counts()
    many = shard(copy.deepcopy(single), mesh="a=2")
    for rows in (2, 3, 4, 5, 6, 2):
        x = torch.ones(rows, 4)
        torch.testing.assert_close(many(x), single(x))


class Asks(nn.Module):
    """Changes a list that it has got, and asks for the sign of a number."""

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor([0.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        values = self.value.tolist()
        values.append(5.0)
        values.sort()
        return x * math.copysign(1.0, self.value[0].item()) + values[-1]


def test_calls_with_the_same_values_have_one_program() -> None:
    single = Asks()
    many: Any = shard(copy.deepcopy(single), mesh="a=2")
    x, programs = torch.ones(4), list[Any]()
    for value in (0.0, -0.0, math.nan, 0.0, -0.0, math.nan):
        single.value[0] = many.value[0] = value
        torch.testing.assert_close(many(x), single(x))
        programs.append(many.compiled)
    assert programs[:3] == programs[3:] and len(set(map(id, programs))) == 3


class Writes(nn.Module):
    """Writes what no version tells of, or what only a run knows."""

    steps: Tensor

    def __init__(self, write: str) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("steps", torch.tensor([0]))

    def forward(self, x: Tensor) -> Tensor:
        if self.write == "foreach":
            torch._foreach_add_([self.steps], 5)  # pyright: ignore[reportPrivateImportUsage] - the one that users call
        elif self.write == "foreach view":
            torch._foreach_add_([self.steps.view(-1)[:1]], 5)  # pyright: ignore[reportPrivateImportUsage] - the one that users call
        elif self.write == "view":
            self.steps.view(-1)[0].fill_(5)
        elif self.write == "data":
            self.steps.data += 5
        elif self.write == "data filled":
            self.steps.data.fill_(5)
        elif self.write == "value":
            self.steps.fill_(x.sum().long())
        else:
            for _ in range(100):
                self.steps += self.steps + 1
        return x * 2 if self.steps > 3 else x


@pytest.mark.parametrize("write", ["foreach", "foreach view", "view", "data", "data filled", "value", "many"])
def test_what_cannot_be_followed_is_not_known(write: str) -> None:
    model = shard(Writes(write), mesh="a=2")
    with pytest.raises(ShardcError, match=r"test_values_asked\.py:\d+.*branches on"):
        model(torch.ones(4))
    assert model.steps == 0
