"""On a GPU: the kernels of attention in every variant, no further from float64 than torch's own are."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc
from checks import forced
from gpu.device import DEVICE, needs_a_gpu, off

pytestmark = needs_a_gpu
MIB = 2**20


@dataclass(frozen=True)
class Call:
    """One call of scaled_dot_product_attention, of `length` queries and keys a head."""

    heads: int = 4
    kv_heads: int = 4
    length: int = 256
    width: int = 64
    causal: bool = True
    masked: bool = False
    dropout: float = 0.0


class Attending(nn.Module):
    """Attention whose operands are parameters, so that their gradients are compared."""

    def __init__(self, call: Call, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def random(heads: int) -> nn.Parameter:
            values = torch.randn(2, heads, call.length, call.width, generator=generator)
            return nn.Parameter(values.to(DEVICE, dtype))

        self.call = call
        self.q, self.k, self.v = random(call.heads), random(call.kv_heads), random(call.kv_heads)
        mask = torch.rand(2, 1, call.length, call.length, generator=generator) > 0.3
        self.register_buffer("mask", (mask | torch.eye(call.length).bool()).to(DEVICE) if call.masked else None)

    def forward(self, x: Tensor) -> Tensor:
        call = self.call
        shared = call.heads > call.kv_heads
        return F.scaled_dot_product_attention(
            self.q * x, self.k, self.v, self.mask, call.dropout, call.causal, enable_gqa=shared
        )  # fmt: skip


def trained(run: nn.Module, model: Attending) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    weights = torch.linspace(-1, 1, model.call.width, device=DEVICE, dtype=model.q.dtype)
    out = run(torch.ones((), device=DEVICE, dtype=model.q.dtype))
    (out * weights).sum().backward()
    gradients = [p.grad for p in (model.q, model.k, model.v)]
    model.zero_grad()
    return [out.detach(), *(g for g in gradients if g is not None)]


CALLS = {
    "causal": Call(),
    "full": Call(causal=False),
    "keys shared by two": Call(kv_heads=2),
    "masked": Call(causal=False, masked=True),
    "wide heads": Call(width=128),
    "odd length": Call(length=250),
    "odd width": Call(width=40),
}
VARIANTS = {
    "gathered": ("cp=2", forced.gathered("cp")),
    "ring": ("cp=2", forced.ring("cp")),
    "split keys": ("cp=2", forced.split_keys("cp")),
    "heads": ("cp=2", forced.ulysses("cp")),
    "ring and heads": ("cp=2,tp=2", forced.hybrid("cp", "tp")),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CALLS)
def test_every_variant_is_as_near_as_torch(case: str, variant: str, dtype: torch.dtype) -> None:
    model, (mesh, accepts) = Attending(CALLS[case], dtype), VARIANTS[variant]
    exact = Attending(CALLS[case], torch.float64)
    exact.load_state_dict(model.state_dict())
    right, alone = trained(exact, exact), trained(model, model)
    with forced.attention(accepts):
        compiled = shardc.compile(model, mesh, (torch.ones((), device=DEVICE, dtype=dtype),), memory="unbounded")
    ours = trained(compiled, model)  # type: ignore[arg-type]
    step = torch.finfo(dtype).eps
    for found, theirs, best in zip(ours, alone, right, strict=True):
        assert found.device.type == DEVICE.type and found.dtype == dtype
        assert off(found, best) <= 2 * off(theirs, best) + 4 * step


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mesh", ["cp=1", "cp=2"])
def test_memory_is_linear(mesh: str, causal: bool) -> None:
    """16,384 positions: their scores alone would take 2 GiB."""
    model = Attending(Call(heads=2, kv_heads=2, length=16384, causal=causal), torch.bfloat16)
    x = torch.ones((), device=DEVICE, dtype=torch.bfloat16)
    compiled = shardc.compile(model, mesh, (x,), memory="unbounded")
    trained(compiled, model)  # type: ignore[arg-type]
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trained(compiled, model)  # type: ignore[arg-type]
        assert torch.cuda.max_memory_allocated() - before < 400 * MIB
    assert compiled.plan.memory.peak < 400 * MIB


@pytest.mark.parametrize("randomness", ["exact", "independent"])
def test_dropout_inside_attention(randomness: str) -> None:
    """The mean over many draws is the result without dropout, and backward saw the same draw as forward."""
    model = Attending(Call(causal=False, dropout=0.25, length=128), torch.float32)
    sharded = shardc.shard(model, mesh="cp=2", randomness=randomness, memory="unbounded")
    x = torch.ones((), device=DEVICE)
    with torch.no_grad():
        mean = torch.stack([sharded(x) for _ in range(400)]).mean(0)
    plain = Attending(Call(causal=False, length=128), torch.float32)(x)
    assert off(mean, plain) < 0.05
    torch.manual_seed(3)
    out = sharded(x)
    (slope,) = torch.autograd.grad(out.square().sum(), model.v)
    # out is linear in v for one draw, so that the sum of v times its gradient is twice the sum of squares
    assert float((slope * model.v).sum()) == pytest.approx(2 * float(out.square().sum()), rel=1e-3)
