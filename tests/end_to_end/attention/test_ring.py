"""Ring attention, and rings beside split heads: values, gradients, and bytes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import shardc
from checks import forced


@dataclass(frozen=True)
class Call:
    """One call of attention: sizes, and what is masked."""

    heads: tuple[int, ...] = (4,)
    """Heads of keys, and how many queries share one, if they do."""
    rows: int = 8
    columns: int = 8
    causal: bool = False
    window: int = 0
    mask: tuple[int, ...] | None = None
    lowest: bool = False
    """Whether the mask adds the lowest number, in some rows to all scores."""
    sinks: bool = False
    softcap: float = 0.0
    dropout: float = 0.0


class Attending(nn.Module):
    """Attention whose operands are parameters, so that their gradients are compared."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        self.call = call
        self.q = nn.Parameter(random(2, *call.heads, call.rows, 4))
        self.k = nn.Parameter(random(2, call.heads[0], call.columns, 4))
        self.v = nn.Parameter(random(2, call.heads[0], call.columns, 6))
        self.sinks = nn.Parameter(random(*call.heads)) if call.sinks else None
        if call.mask is not None:
            mask = random(*call.mask) > -0.5
            if call.lowest:
                mask[..., 1:4, :] = False
                mask = torch.zeros(call.mask, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
            self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        call, mask = self.call, getattr(self, "mask", None)
        draw = torch.ops.shardc.attention_draw(x, [*x.shape[:-1], call.columns]) if call.dropout else None
        literals = (call.causal, 0.5, call.window, call.softcap, call.dropout)
        out, _ = torch.ops.shardc.attention(self.q + x, self.k, self.v, mask, self.sinks, draw, *literals)
        return (out * out.detach().sin()).sum()

    @property
    def x(self) -> Tensor:
        return torch.randn(self.q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check(call: Call, mesh: str, accepts: forced.Accepts) -> shardc.Compiled:
    """The result and every gradient equal those of one device, and the plan knows the bytes."""
    model = Attending(call)
    torch.manual_seed(5)
    expected = model(model.x)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with forced.attention(accepts):
        compiled = shardc.compile(model, mesh, (model.x,))
    torch.manual_seed(5)
    found = compiled(model.x)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    sent = compiled.executable.mesh.traffic
    assert compiled.plan.bytes_per_axis == pytest.approx(sent, rel=1e-12)
    return compiled


CAUSAL, WINDOW = Call(causal=True), Call(causal=True, window=3)
CALLS = {
    "full": Call(),
    "causal": CAUSAL,
    "mask": Call(mask=(2, 1, 8, 8)),
    "lowest numbers": Call(mask=(2, 1, 8, 7), columns=7, lowest=True),
    "lowest numbers, capped": Call(mask=(2, 1, 8, 8), softcap=2.0, lowest=True),
    "mask of columns": Call(mask=(1, 1, 1, 8), causal=True),
    "window": WINDOW,
    "window both ways": Call(window=2),
    "four share one": replace(CAUSAL, heads=(1, 4)),
    "two share one": replace(CAUSAL, heads=(2, 2)),
    "uneven": Call(rows=7, columns=7, causal=True),
    "more keys than queries": Call(rows=6, columns=9, causal=True, window=5),
    "soft cap and sinks": replace(WINDOW, softcap=1.5, sinks=True),
    "sinks of groups": Call(heads=(2, 2), sinks=True, mask=(2, 2, 1, 8, 8)),
    "dropout": replace(CAUSAL, dropout=0.25),
}
RINGS = {"a=3": "a", "a=4": "a", "a=2,b=2": "ab"}


def rings(compiled: shardc.Compiled) -> int:
    return compiled.code.count("ring_attention(") + compiled.code.count("ring_attention_backward(")


@pytest.mark.parametrize("case", CALLS)
def test_a_ring_over_two_axes(case: str) -> None:
    assert rings(check(CALLS[case], "a=2,b=2", forced.ring("a", "b"))) == 2


@pytest.mark.parametrize("mesh", ["a=2", "a=3", "a=4"])
@pytest.mark.parametrize("case", ["causal", "two share one", "uneven", "mask of columns", "soft cap and sinks"])
def test_a_ring_over_one_axis(case: str, mesh: str) -> None:
    assert rings(check(CALLS[case], mesh, forced.ring("a"))) == 2


@pytest.mark.parametrize(("around", "heads", "case"), [
    (*pair, case) for case, pair in zip(CALLS, itertools.cycle(itertools.permutations("ab")))
])  # fmt: skip
def test_a_ring_over_one_axis_and_heads_over_the_other(case: str, around: str, heads: str) -> None:
    assert rings(check(CALLS[case], "a=2,b=2", forced.hybrid(around, heads))) == 2


@pytest.mark.parametrize("mesh", RINGS)
@pytest.mark.parametrize("way", [forced.gathered, forced.split_keys, forced.ulysses])
def test_the_other_variants(way: type, mesh: str) -> None:
    call = replace(WINDOW, heads=(6 if mesh == "a=3" else 4, 2), sinks=True)
    assert not rings(check(call, mesh, way(*RINGS[mesh])))
