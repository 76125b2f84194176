"""Folded sequences: a causal decoder from tokens to loss and back, what folds and what does not, and who chooses it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from samples.causal_decoder import CausalDecoder
from shardc.api import Compiled
from shardc.cost.hardware import Hardware, Link

APART = Hardware("slow", {"float32": 1e6, "float64": 1e6}, 1e12, 1e-7, 8, Link(1e-5, 1e7), Link(1e-5, 1e7))
"""Computes so slowly that nothing is computed twice."""
BESIDE = replace(APART, inside=Link(1e-5, 1e7, overlap=1.0), between=Link(1e-5, 1e7, overlap=1.0))
"""Sends while it computes, so that a ring is free."""


def tokens(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, 24, (batch, length), generator=torch.Generator().manual_seed(1))


def compiled(model: nn.Module, mesh: str, given: Tensor, device: Hardware = APART, **options: Any) -> Compiled:
    return shardc.compile(model, mesh, (given,), hardware=device, **options)


def check(model: nn.Module, mesh: str, given: Tensor, device: Hardware = APART, **options: Any) -> Compiled:
    """Values and every gradient are those of the single device."""
    single, program = copy.deepcopy(model), compiled(model, mesh, given, device, **options)
    expected, found = single(given), program(given)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    expected.backward()
    found.backward()
    for (name, one), other in zip(single.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(
            other.grad, one.grad, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )
    return program


MESHES = pytest.mark.parametrize(("mesh", "batch"), [("cp=2", "-"), ("cp=3", "-"), ("cp=4", "-"), ("dp=2,cp=2", "dp")])


@MESHES
@pytest.mark.parametrize("device", [APART, BESIDE], ids=["gathered keys", "ring"])
def test_a_decoder_stays_folded_from_its_inputs_to_the_loss(mesh: str, batch: str, device: Hardware) -> None:
    torch.manual_seed(0)
    model = CausalDecoder(batch, "cp~folded").double()
    program = check(model, mesh, tokens(length=192), device)
    sent = [one for one in program.plan.conversions if not one.value.endswith(".weight")]
    text = str(program.graph("localize"))
    assert "n=Part(('cp~folded',), 192)" in text
    assert not {one.kind for one in sent} & {"reorder", "all_to_all"}
    forward = [one for one in sent if one.phase == "forward"]
    if device is BESIDE:
        assert "ring_attention(" in text and "ring_attention_backward(" in text
        # tokens and labels are cut, the loss is summed
        assert {one.kind for one in forward} <= {"shard", "permute", "all_reduce"}, forward
    else:
        assert "attention_in_parts(" in text
        assert all("attention," in one.place for one in forward if one.kind == "all_gather"), forward
