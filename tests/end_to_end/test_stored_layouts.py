"""Parameters stored across the pieces in which the model uses them: gathered before use, gradients scattered after."""

from __future__ import annotations

import copy

import pytest
import torch

from samples.models import MODELS
from shardc import shard


# along dim 1 it is the output projection whose heads are cut
@pytest.mark.parametrize("axis", [0, 1])
def test_key_heads_stored_in_more_parts_than_there_are_heads(axis: int) -> None:
    torch.manual_seed(0)
    single, inputs = MODELS["llama"](torch.float64)  # 2 key heads of 16
    spec = ("dp", None) if axis == 0 else (None, "dp")
    model = shard(copy.deepcopy(single), mesh="dp=4", hardware="cpu", constraints={"*_proj.weight": spec})
    loss, expected = model(**inputs), single(**inputs)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for (name, one), other in zip(model.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)
    layouts = {placed.name: str(placed.layout) for placed in model.plan.placed}
    key = next(name for name in layouts if name.endswith("layers.0.self_attn.k_proj.weight"))
    assert layouts[key] == ("[32@dp, 64]" if axis == 0 else "[32, 64@dp]")
    assert "retile" not in model.code
    assert "retile" in model.graph("retile")
