"""`microbatches="auto"`: as many as make the fastest step that fits into memory."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc.errors import ShardcError
from shardc.explain.plan_file.as_json import as_json, written


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(1024, 4096, bias=False), nn.Linear(4096, 1024, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))).square().mean()


def planned(microbatches: int | Literal["auto"], memory: str = "300MB") -> shardc.Plan:
    with torch.device("meta"):
        model, x = Mlp(), torch.empty(65536, 1024)
    made = shardc.compile(model, "dp=4", (x,), hardware="h100", memory=memory, microbatches=microbatches, cache=False)
    return made.plan


def test_auto_is_the_fastest_number_that_fits() -> None:
    """One and two do not fit; four do, with something computed again, and eight take longer."""
    chosen = planned("auto")
    with pytest.raises(ShardcError, match="no plan was found"):
        planned(2)
    assert written(as_json(chosen)) == written(as_json(planned(4)))
    assert chosen.predicted < planned(8).predicted


def test_advice_prices_other_numbers_as_compile_does() -> None:
    found, eight = planned(4).advice()[-1], planned(8)
    assert found.change == "8 micro-batches in place of 4" and found.gain < 0.0
    assert found.summary.seconds == pytest.approx(eight.predicted) and found.summary.held == eight.memory.peak
    assert found.saved == planned(4).memory.peak - eight.memory.peak and str(found).endswith("92.0 MiB less)")


def test_auto_is_one_where_nothing_binds() -> None:
    assert planned("auto", "unbounded").turns == 1


def test_auto_is_one_where_samples_are_coupled() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), torch.randn(16, 8)
    one = shardc.compile(model, "dp=2", (x,), hardware="h100", microbatches="auto")
    assert one.plan.turns == 1
    with pytest.raises(ShardcError, match=r"'many' must be a whole number, 1 or more, or 'auto'"):
        shardc.compile(model, "dp=2", (x,), microbatches="many")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_a_batch_that_does_not_divide_as_others_did_has_a_number_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    sharded: Any = shardc.shard(model, mesh="a=2", hardware="h100", memory="600KB", microbatches="auto", cache=False)
    found: list[int] = []
    for rows in (4096, 1023):  # the last of an epoch is smaller
        sharded(torch.randn(rows, 16)).sum().backward()
        found.append(sharded.plan.turns)
    assert found[0] > 1 == found[1]


def test_a_mean_that_is_rounded_is_refused_with_the_way_out() -> None:
    with pytest.raises(ShardcError, match=r"rounds a sum over all samples to fewer bits.*return it in float32"):
        shardc.compile(Mlp(), "dp=2", (torch.randn(4, 1024),), microbatches=2, param_dtype="bfloat16")
