"""A step's speed as measured, beside what the plan predicts; and whose rows a rank gets."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import shardc
from shardc.errors import ShardcError
from shardc.explain.summary import Summary
from shardc.ir.mesh import Mesh
from shardc.training.progress import StepSpeed

PLANNED = Summary(Mesh((("dp", 2),)), "h100", seconds=0.010, rows=1000, flops=1e9, mfu=0.5)


class Planned(nn.Module):
    """A model whose plan is known."""

    def __init__(self) -> None:
        super().__init__()
        vars(self)["_shardc"] = None

    @property
    def plan(self) -> Planned:
        return self

    summary = PLANNED


def test_a_line_has_both() -> None:
    speed = StepSpeed(20, 0.020, PLANNED)
    assert speed.rate == 50_000 and speed.mfu == 0.25
    assert str(speed) == ("step 20: 20.00 ms (predicted 10.00 ms), 50,000 tokens a second, MFU 25.0% (predicted 50.0%)")


def test_the_first_step_does_not_count_and_the_last_is_told() -> None:
    told: list[StepSpeed] = []
    items = list(shardc.progress(range(6), Planned(), every=2, show=told.append))
    assert items == [*range(6)] and [one.step for one in told] == [3, 5, 6]
    assert all(one.seconds > 0 and one.planned is PLANNED for one in told)
    assert list(shardc.progress([], Planned(), show=told.append)) == []
    with pytest.raises(ShardcError, match="name a sharded model, and every=1 or more"):
        shardc.progress([1], nn.Linear(2, 2))


def test_one_process_gets_all_rows() -> None:
    rows = TensorDataset(torch.arange(10))
    model = shardc.shard(nn.Linear(2, 2), mesh="dp=2", data="dp")
    sampler = shardc.data_sampler(rows, model, shuffle=False)
    assert list(sampler) == [*range(10)]
    with pytest.raises(ShardcError, match="the model is not sharded"):
        shardc.data_sampler(rows, nn.Linear(2, 2))
