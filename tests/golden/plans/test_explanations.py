"""What plans answer, as it is printed."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shardc
from samples.textbook import MLP
from shardc import constrain
from shardc.cost.hardware import Hardware
from shardc.explain.plan import Plan

Golden = Callable[[str, str], None]


def megatron(x: Tensor, mesh: str = "dp=2,tp=4") -> Plan:
    with torch.device("meta"):
        model: nn.Module = MLP(4096, 16384)
    constraints = {"down.weight": (None, "tp")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hardware, "hiding", lambda *_: ())  # nothing goes round a ring: the plan is Megatron's
        return shardc.compile(model, mesh, (x,), hardware="h100", constraints=constraints).plan


def timeless(answers: list[object]) -> str:
    """The texts without seconds and shares, which belong to the cost model."""
    text = "\n\n".join(map(str, answers)) + "\n"
    return re.sub(r" *[\d.]+ [mun]?s\b", " TIME", re.sub(r"\([+-][\d.]+%\)", "(SHARE)", text))


def test_why(golden: Golden) -> None:
    plan = megatron(torch.empty(4096, 4096, device="meta"))
    names = ("up.weight", "down.weight", "up", "relu", "down", "input:0")
    golden("why", timeless([plan.why(name) for name in names]))


def test_why_not(golden: Golden) -> None:
    plan = megatron(torch.empty(4096, 4096, device="meta"))
    asked = (("up.weight", "-,tp"), ("up.weight", "f32[16384@dp, 4096]"), ("down.weight", "tp,-"), ("relu", "dp,-"))
    golden("why_not", timeless([plan.why_not(name, layout) for name, layout in asked]))


class Rows(nn.Module):
    """Rows are split, and then sorted; and a product of rows with rows."""

    def forward(self, x: Tensor) -> Tensor:
        rows = constrain(x.sin(), (None, "dp"))
        ordered = (rows * 2).sort(dim=1).values
        split = constrain(ordered.cos(), (("tp", "dp"), "?"))
        return (split @ split.t()).sum()


def test_conflicts(golden: Golden) -> None:
    plan = shardc.compile(Rows(), "dp=2,tp=2", (torch.zeros(8, 8),), hardware="h100").plan
    golden("conflicts", "\n\n".join(map(str, plan.conflicts())) + "\n")
