"""Random towers of equal layers: code with a function for each kind of layer gives what flat code gives, bit by bit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import shardc
from shardc.runtime import Executable, load
from shardc.source.grammar import LineKind, read
from shardc.source.module import source_of

PARTS = {
    "norm": lambda: nn.LayerNorm(8),
    "linear": lambda: nn.Linear(8, 8, bias=False),
    "wide": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
    "drop": lambda: nn.Dropout(0.2),
    "tanh": nn.Tanh,
}


class Towers(nn.Module):
    """Layers of one kind, one that differs at `odd`, and a part of the results of all layers where they are asked."""

    def __init__(self, parts: list[str], count: int, odd: int, skip: bool, every: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(*(PARTS[part]() for part in parts)) for _ in range(count))
        if odd < count:
            self.layers[odd].append(nn.Tanh())
        self.skip, self.every = skip, every

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum()
        for layer in self.layers:
            x = x + layer(x) if self.skip else layer(x)
            total = total + x.square().sum() if self.every else total
        return total + x.square().mean()


@settings(max_examples=6)
@given(
    st.lists(st.sampled_from(sorted(PARTS)), min_size=2, max_size=4),
    st.integers(3, 5), st.integers(0, 9), st.booleans(), st.booleans(), st.sampled_from(["dp=2", "dp=2,tp=2"]),
)  # fmt: skip
def test_layers_as_functions_give_what_flat_code_gives(
    parts: list[str], count: int, odd: int, skip: bool, every: bool, mesh: str
) -> None:
    torch.manual_seed(0)
    model, x = Towers(["linear", *parts], count, odd, skip, every), torch.randn(8, 8, requires_grad=True)
    c = shardc.compile(model, mesh, (x,), hardware="cpu")._last
    found: list[list[Tensor]] = []
    for source in (c.code(), source_of(c.lowered.read(), c.program, c.mesh, loops=False)):
        lines = read(source)
        model.zero_grad()
        torch.manual_seed(0)
        (y,) = Executable(load(source)).bind(model)(x)
        y.backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert all(line.kind is not LineKind.LOOP for line in lines["forward"]) or source == c.code()
    assert all(map(torch.equal, *found))
