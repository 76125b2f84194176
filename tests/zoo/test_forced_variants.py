"""Models of transformers train three steps like the single device, with each variant of attention forced.

All models with all variants with --whole-zoo, else a few. Those with experts: test_expert_models.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import transformers as t

import shardc
from checks import forced
from checks.training import losses_of
from zoo.case import ROUNDED
from zoo.text import EXPERTS, LLAMA, decoder

WINDOWED = {**LLAMA, "head_dim": 8, "sliding_window": 4}
LATENT = dict(
    q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
    num_key_value_heads=4,
)  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama": decoder(t.LlamaForCausalLM, t.LlamaConfig, **LLAMA),
    "gemma2": decoder(t.Gemma2ForCausalLM, t.Gemma2Config, **WINDOWED),
    "gemma3": decoder(
        t.Gemma3ForCausalLM, t.Gemma3TextConfig, **WINDOWED, layer_types=["sliding_attention"]
    ),
    "mistral": decoder(t.MistralForCausalLM, t.MistralConfig, **{**LLAMA, "sliding_window": 4}),
    "gpt_oss": decoder(t.GptOssForCausalLM, t.GptOssConfig, **EXPERTS, head_dim=8, sliding_window=4),
    "qwen3": decoder(t.Qwen3ForCausalLM, t.Qwen3Config, **{**LLAMA, "head_dim": 8}),
    "deepseek_v3": decoder(t.DeepseekV3ForCausalLM, t.DeepseekV3Config, **{**LLAMA, **LATENT}),
}  # fmt: skip
Forced = Callable[[], AbstractContextManager[None]]
VARIANTS: dict[str, tuple[str, Forced]] = {
    "gathered": ("cp=2", lambda: forced.attention(forced.gathered("cp"))),
    "ring": ("cp=2", lambda: forced.attention(forced.ring("cp"))),
    "split_keys": ("cp=2", lambda: forced.attention(forced.split_keys("cp"))),
    "ulysses": ("cp=2", lambda: forced.attention(forced.ulysses("cp"))),
    "hybrid": ("cp=2,tp=2", lambda: forced.attention(forced.hybrid("cp", "tp"))),
}
SAMPLE = [("gemma2", "ring"), ("llama", "hybrid")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = [(name, variant) for name in MODELS for variant in VARIANTS]
    metafunc.parametrize(("name", "variant"), every if metafunc.config.getoption("--whole-zoo") else SAMPLE)


def test_trains_like_the_single_device(name: str, variant: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    alone = copy.deepcopy(model)
    mesh, force = VARIANTS[variant]
    with force():
        compiled = shardc.compile(model, mesh, inputs, hardware="h100", memory="unbounded")
    trained = [
        losses_of(call, inputs, torch.optim.AdamW(whose.parameters(), 1e-2, eps=1e-3))
        for call, whose in ((compiled, model), (alone, alone))
    ]
    assert trained[1][-1] < trained[1][0]
    torch.testing.assert_close(*trained, rtol=ROUNDED, atol=ROUNDED)
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=ROUNDED, atol=ROUNDED)
