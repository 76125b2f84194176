"""What plans assume of sizes, against the sizes at which their strategies are in fact reused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc import constrain
from shardc.api import Compiled
from shardc.capture.inputs import flatten
from shardc.errors import InfeasibleError
from shardc.explain.plan import Plan
from shardc.ir.model_call import ModelCall


@torch.library.custom_op("shardc_tests::evenly_assumed", mutates_args=())
def even_op(x: Tensor) -> Tensor:
    """An operator of which nobody knows what it makes of padding."""
    return x.exp()


@even_op.register_fake
def _even_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


shardc.rule(even_op, "a b -> a b")


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.up = nn.Linear(8, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.up(x))


def batch(x: Tensor) -> Tensor:
    return constrain(x, (("dp", "tp"), "?", "?")).relu().sum()


def two_splits(x: Tensor) -> Tensor:
    return constrain(x.sin(), ("dp", "?", "?")).sum() + constrain(x.cos(), ("tp", "?", "?")).sum()


def evenly(x: Tensor) -> Tensor:
    return even_op(constrain(x.flatten(1), ("tp", "?")).detach()).sum() + x.sum()


def flattened(x: Tensor) -> Tensor:
    return constrain(x, ("dp", "tp", "?")).flatten(0, 1).square().sum()


def answers(function: Callable[[Tensor], Tensor]) -> tuple[Compiled, Plan]:
    model = Function(function)
    inputs = (torch.zeros(24, 6, 8),)
    compiled = shardc.compile(model, "dp=2,tp=3", inputs, mode="propagate", dynamic={"x": {0: "batch"}})
    return compiled, compiled.plan


@pytest.mark.parametrize("function", [batch, two_splits, evenly, flattened])
def test_sizes_at_which_a_plan_is_reused(function: Callable[[Tensor], Tensor]) -> None:
    compiled, plan = answers(function)
    (assumed,) = [a for a in plan.assumes() if "input:0 dim 0" in a.dims]
    for size in range(2, 26):
        call = ModelCall(Function(function), (torch.zeros(size, 6, 8),), {})
        try:
            notes = compiled.at(call, flatten((call.args, dict(call.kwargs)))[0]).plan.notes
        except InfeasibleError:  # what was demanded of it needs more elements
            assert size < assumed.least
            continue
        reused = size == 24 or any("the layouts were planned at batch=24" in note for note in notes)
        assert reused == assumed.holds(size), f"{size}: {assumed}"
        if reused and size % assumed.even == 0:
            assert not any("is padded" in note for note in notes)


def test_what_is_said() -> None:
    assert [str(a) for a in answers(batch)[1].assumes()] == [
        "input:0 dim 0 (24): even at multiples of 6, padded otherwise; not below 6"
    ]
    assert str(answers(evenly)[1].assumes()[0]).startswith("input:0 dim 0 (24): only multiples of 3")


def test_inputs_that_share_a_size_have_one_assumption() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return constrain(x + y, ("a", "?")).sum()

    plan = shardc.compile(Both(), "a=4", (torch.zeros(8, 4), torch.zeros(8, 4))).plan
    assert [a.dims for a in plan.assumes()] == [("input:0 dim 0", "input:1 dim 0")]


def test_nothing_split_nothing_assumed() -> None:
    assert shardc.compile(nn.ReLU(), "a=4", (torch.zeros(8, 4),), hardware="h100").plan.assumes() == ()
