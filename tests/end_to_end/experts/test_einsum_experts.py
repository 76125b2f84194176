"""Experts by one-hot products with a capacity (GShard): groups of tokens go to experts by all-to-all of their slots."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc

WIDTH, INNER, COUNT, CAPACITY = 8, 16, 4, 6
X = torch.randn(4, 12, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class GShard(nn.Module):
    """Two experts a token, of which each takes the first tokens of a group: second choices come behind the first."""

    def __init__(self, width: int = WIDTH, inner: int = INNER, capacity: int = CAPACITY, split: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(width, COUNT, bias=False)
        self.up = nn.Parameter(torch.randn(COUNT, width, inner) * 0.3)
        self.down = nn.Parameter(torch.randn(COUNT, inner, width) * 0.3)
        self.capacity, self.split = capacity, split

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(-1)
        combine, before = torch.zeros(()), torch.zeros((), dtype=torch.long)
        for choice in gates.topk(2, dim=-1).indices.unbind(-1):
            chosen = F.one_hot(choice, COUNT)
            place = (chosen.cumsum(-2) - 1 + before) * chosen
            before = before + chosen.sum(-2, keepdim=True)
            kept = chosen * (place < self.capacity)
            slot = F.one_hot((place * kept).sum(-1), self.capacity).to(x.dtype)
            combine = combine + torch.einsum("gte,gtc->gtec", gates * kept, slot)
        inputs = torch.einsum("gtec,gtm->egcm", combine.bool().to(x.dtype), x)
        if self.split:  # as plans of larger sizes do
            inputs = shardc.constrain(inputs, "-,ep,-,-")
        hidden = torch.einsum("egcm,emf->egcf", inputs, self.up).relu()
        if self.split:
            hidden = shardc.constrain(hidden, "ep,-,-,-")
        results = torch.einsum("egcf,efm->egcm", hidden, self.down)
        return torch.einsum("gtec,egcm->gtm", combine, results).sin().sum()


@pytest.mark.parametrize("mesh", ["ep=4", "dp=2,ep=2"])
def test_slots_go_to_their_experts_and_back(mesh: str) -> None:
    model = GShard().double()
    alone = copy.deepcopy(model)
    mine, theirs = X.clone().requires_grad_(), X.clone().requires_grad_()
    compiled = shardc.compile(model, mesh, (mine,), hardware="h100", memory="unbounded")
    loss, expected = compiled(mine), alone(theirs)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip((mine, *model.parameters()), (theirs, *alone.parameters()), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)
    assert compiled.code.count("all_to_all") >= 2


def test_experts_are_split_where_they_are_large() -> None:
    """In forward and in backward, slots travel there and back; weights do not."""
    with torch.device("meta"):
        model, x = GShard(1024, 4096, 512, split=False), torch.empty(8, 1024, 1024, requires_grad=True)
    code = shardc.compile(model, "ep=4", (x,), hardware="h100", memory="unbounded").code
    products = [line for line in code.splitlines() if "bmm" in line and "4096]" in line]
    assert products and all(f"[{COUNT}@ep," in line for line in products)
    assert code.count("= all_to_all") == 4 and "all_gather" not in code
