"""Outputs: what is small comes back whole, what is large as it lies, and the plan says which."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_structure

import shardc
from shardc.ir.program import output_names
from shardc.options import SMALL


class Pair(NamedTuple):
    first: Any
    second: Any


class Tagger(nn.Module):
    """A loss, classes and logits, of which only the logits are large."""

    def __init__(self, classes: int = 1024) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 32, bias=False), nn.Linear(32, classes, bias=False)

    def forward(self, x: Tensor) -> dict[str, Any]:
        logits = self.head(torch.relu(self.body(x)))
        return {"loss": logits.square().mean(), "more": (logits, logits.argmax(-1))}


ROWS = 512  # of 1024 float32: 2 MiB
SPLIT = {"head": ("dp", "tp")}


def planned(rows: int = ROWS, **options: Any) -> shardc.Plan:
    return shardc.compile(Tagger(), "dp=2,tp=2", (torch.zeros(rows, 16),), constraints=SPLIT, **options).plan


def lies(plan: shardc.Plan) -> dict[str, str]:
    return {one.name: str(one.layout) for one in plan.outputs}


def test_the_large_comes_as_it_lies_and_the_small_whole() -> None:
    assert ROWS * 1024 * 4 > SMALL
    plan = planned()
    assert lies(plan) == {"loss": "[]", "more.0": f"[{ROWS}@dp, 1024@tp]", "more.1": f"[{ROWS}]"}
    (note,) = plan.notes
    assert note.startswith("more.0 comes back split") and "full_tensor()" in note and "outputs='full'" in note
    assert f"more.0       f32[{ROWS}@dp, 1024@tp]" in str(plan) and "output     loss" in str(plan)


def test_up_to_a_mebibyte_all_is_whole() -> None:
    plan = planned(256)
    assert lies(plan)["more.0"] == "[256, 1024]" and plan.notes == ()
    assert plan.cost == planned(256, outputs="full").cost


def test_nothing_is_paid_for_what_nobody_asked_for() -> None:
    auto, full, sharded = planned(), planned(outputs="full"), planned(outputs="sharded")
    assert sharded.cost <= auto.cost < full.cost
    assert lies(full)["more.0"] == f"[{ROWS}, 1024]"
    gathered = {c.value for c in full.conversions if c.kind == "all_gather"}
    assert gathered - {c.value for c in auto.conversions if c.kind == "all_gather"}


@pytest.mark.parametrize("outputs", ["auto", "full", "sharded"])
def test_values_and_gradients_on_a_virtual_mesh_are_global(outputs: Any) -> None:
    torch.manual_seed(0)
    single, x = Tagger().double(), torch.randn(ROWS, 16, dtype=torch.float64)
    model = shardc.shard(copy.deepcopy(single), mesh="dp=2,tp=2", constraints=SPLIT, outputs=outputs)
    made, right = model(x), single(x)
    for one, other in ((made["loss"], right["loss"]), *zip(made["more"], right["more"], strict=True)):
        assert type(one) is Tensor
        torch.testing.assert_close(one, other)
    for model_, result in ((model, made), (single, right)):
        (result["more"][0].logsumexp(-1).sum() + result["loss"]).backward()
        assert all(parameter.grad is not None for parameter in model_.parameters())
    for one, other in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_names_of_outputs_are_those_of_the_users_structure() -> None:
    def names(output: Any) -> list[str]:
        return output_names(tree_structure(output))

    assert names(1) == ["output:0"] and names((1, [2, 3])) == ["output:0", "output:1.0", "output:1.1"]
    assert names({"loss": 1, "past": [(2, 3)]}) == ["loss", "past.0.0", "past.0.1"]
    assert names(Pair(1, (2, 3))) == ["first", "second.0", "second.1"]
