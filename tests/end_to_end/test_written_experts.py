"""Experts that a model writes out itself run as the one operator, and train like the single device on every mesh."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from checks import forced
from samples import written_experts as written
from shardc.capture.trace import capture
from shardc.errors import CaptureError

EXACT = dict(rtol=1e-10, atol=1e-10)
CALLS = {"": "shardc.experts.default(", "in_parts": "experts_in_parts(", "exchanged": "experts_exchanged("}
WAYS = [("ep=2", "exchanged"), ("ep=3", "in_parts"), ("ep=4", "exchanged"), ("dp=2,ep=2", "in_parts"), ("ep=2", "")]
X = torch.randn(4, 6, written.D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


class Program(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer().double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sin().sum()


def gradients(model: Any, program: Program, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    program.zero_grad()
    model(x).backward()
    # an expert without tokens has no gradient, or zeros
    leaves = [x, *program.parameters()]
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def compare(model: Any, program: Program, alone: Program, x: Tensor) -> None:
    torch.testing.assert_close(model(x).detach(), alone(x).detach(), **EXACT)
    for one, other in zip(gradients(model, program, x), gradients(alone, alone, x), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("name", written.LAYERS)
def test_trains_like_the_single_device(name: str) -> None:
    """Routings of every kind: as the router says, all tokens to one expert, and tokens that are all alike."""
    program = Program(written.LAYERS[name])
    alone = copy.deepcopy(program)
    mesh, variant = WAYS[list(written.LAYERS).index(name) % len(WAYS)]
    with forced.experts(variant):
        compiled = shardc.compile(program, mesh, (X,), hardware="h100", memory="unbounded")
    assert CALLS[variant] in compiled.code
    assert not [call for call in ("nonzero(", "aten.silu", "aten.gelu") if call in compiled.code]
    for x in (X, X.abs() * 3, X[:1, :1].expand_as(X)):
        compare(compiled, program, alone, x)
