"""What a plan says that a rank holds at most, against what it allocates: attention, vocabulary and experts, each split
in all ways. What kernels of torch allocate inside is compared in tests/unit/rules/test_workspace.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc
from checks import forced
from checks.meter import metered
from samples.causal_decoder import CausalDecoder
from shardc.rules.families import attention_workspace

Case = tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]


def decoder(sequence: str | None) -> Case:
    model = CausalDecoder(sequence=sequence, width=64, heads=4, kv_heads=2, vocabulary=96, layers=2)
    return model, (torch.randint(0, 96, (2, 192)),), {}


def vocabulary() -> Case:
    """Logits are most of the memory; the vocabulary is split."""
    model = CausalDecoder(width=16, heads=2, kv_heads=2, vocabulary=2048, layers=1)
    return model, (torch.randint(0, 2048, (2, 64)),), {"head.weight": "x,-", "embed.weight": "x,-"}


class Experts(nn.Module):
    """Two layers of experts, of which every token takes all, so that each gets as many as the plan reckons with."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=4)
        self.layers = nn.ModuleList(MixtralExperts(config) for _ in range(2))
        self.scores = nn.Linear(32, 4, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, ids, F.softmax(self.scores(x), -1))
        return x.square().mean()


def experts() -> Case:
    return Experts(), (torch.randn(256, 32), torch.arange(4).repeat(256, 1)), {}


def whole(split: Any, variant: str) -> bool:
    return not {"r", "s"} & split.keys()


CASES: dict[str, tuple[Callable[[], Case], Callable[[], AbstractContextManager[None]]]] = {
    "attention whole": (lambda: decoder(None), lambda: forced.attention(whole)),
    "queries split, keys gathered": (lambda: decoder("x"), lambda: forced.attention(forced.gathered("x"))),
    "ring": (lambda: decoder("x"), lambda: forced.attention(forced.ring("x"))),
    "vocabulary": (vocabulary, nullcontext),
    "experts in parts": (experts, lambda: forced.experts("in_parts")),
    "experts exchanged": (experts, lambda: forced.experts("exchanged")),
}


@pytest.mark.parametrize("name", CASES)
def test_predicted_peak(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(attention_workspace, "inside_kernel", lambda *_: [])
    torch.manual_seed(0)
    made, forcing = CASES[name]
    model, inputs, constraints = made()
    with forcing():
        compiled = shardc.compile(model, "x=2", inputs, hardware="cpu", constraints=constraints)
    meters = metered(compiled.executable.module)
    compiled(*inputs).backward()
    memory = compiled.plan.memory
    predicted = memory.peak - memory.parts.get("optimizer state", 0.0)
    # in collectives the threads of a virtual mesh hold what belongs to others, for as long as they happen to take
    found = [meter.peak for meter in meters.values()]
    assert any(predicted == pytest.approx(one, rel=0.05) for one in found), (predicted, found, memory)
