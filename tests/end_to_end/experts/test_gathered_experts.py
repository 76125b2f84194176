"""Experts whose weights are gathered for each token run as the one operator, and train like the single device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc
from checks import forced
from samples import gathered_experts as gathered
from samples.written_experts import Program
from shardc.capture.trace import capture

EXACT: dict[str, Any] = dict(rtol=1e-10, atol=1e-10)
WAYS = {
    "gpt-fast": ("ep=2", "exchanged"),
    "gpt-oss": ("ep=3", "in_parts"),
    "one choice": ("dp=2,ep=2", "exchanged"),
    "repeated rows": ("ep=4", ""),
}
X = torch.randn(4, 6, gathered.D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", gathered.LAYERS)
def test_trains_like_the_single_device(name: str) -> None:
    program, (mesh, variant) = Program(gathered.LAYERS[name]), WAYS[name]
    alone = copy.deepcopy(program)
    with forced.experts(variant):
        compiled = shardc.compile(program, mesh, (X.clone().requires_grad_(),), hardware="h100", memory="unbounded")
    assert forced.EXPERT_CALLS[variant] in compiled.code
    assert compiled.code.count("aten.index.Tensor(") == (name == "gpt-oss"), "a bias that is added in place"
    for given in (X, X[:1, :1].expand_as(X)):
        mine, theirs = (given.clone().requires_grad_() for _ in range(2))
        for model, of, x in ((compiled, program, mine), (alone, alone, theirs)):
            of.zero_grad()
            model(x).backward()
        leaves = zip((mine, *program.parameters()), (theirs, *alone.parameters()), strict=True)
        torch.testing.assert_close(compiled(given).detach(), alone(given).detach(), **EXACT)
        for one, other in leaves:
            torch.testing.assert_close(one.grad, other.grad, **EXACT)


class Reversed(gathered.OneChoice):
    """The second product is that of another expert."""

    def forward(self, x: Tensor) -> Tensor:
        ids = self.gate(x).argmax(-1)
        hidden = torch.matmul(x.unsqueeze(-2), self.up[ids]).relu()
        return torch.matmul(hidden, self.down[gathered.COUNT - 1 - ids]).squeeze(-2)


class AcrossTokens(gathered.OneChoice):
    """Something is computed across tokens between the products."""

    def forward(self, x: Tensor) -> Tensor:
        ids = self.gate(x).argmax(-1)
        hidden = torch.matmul(x.unsqueeze(-2), self.up[ids]).flip(0)
        return torch.matmul(hidden, self.down[ids]).squeeze(-2)


class Given(gathered.OneChoice):
    """Ids that may be no experts at all, for which eager mode raises."""

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[..., 0] * 10).long()
        return torch.matmul(torch.matmul(x.unsqueeze(-2), self.up[ids]).relu(), self.down[ids])


class OtherRows(gathered.OneChoice):
    """Each expert gets the row of another token."""

    def forward(self, x: Tensor) -> Tensor:
        ids = self.gate(x).argmax(-1)
        rows = x[:, :4].transpose(0, 1).unsqueeze(-2)
        hidden = torch.matmul(rows, self.up[ids[:, :4]]).relu()
        return torch.matmul(hidden, self.down[ids[:, :4]]).squeeze(-2)


class TwoBiases(gathered.GptOss):
    """Each half of a product has the bias of another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.randn_like(self.b1))

    def forward(self, x: Tensor) -> Tensor:
        ids = self.route(x)[1]
        made = torch.einsum("bsckd,bsd->bsck", self.w1[ids], x)
        gate, up = (made + self.b1[ids])[..., : gathered.INNER], (made + self.other[ids])[..., gathered.INNER :]
        return torch.einsum("bsckd,bscd->bsck", self.w2[ids], F.silu(gate) * up)


@pytest.mark.parametrize("layer", [Reversed, AcrossTokens, Given, TwoBiases])
def test_what_is_something_else_stays_as_it_is(layer: Any) -> None:
    captured = capture(Program(layer), (X,), grad=False)
    assert torch.ops.shardc.experts.default not in {node.target for node in captured.graph.nodes}


def test_rows_may_lie_in_another_order() -> None:
    program = Program(OtherRows)
    with torch.no_grad():
        compiled = shardc.compile(program, "ep=2", (X,), hardware="h100", memory="unbounded")
        torch.testing.assert_close(compiled(X), program(X), **EXACT)
