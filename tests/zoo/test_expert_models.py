"""Models of transformers with experts: with AdamW, every variant trains like the single device.

Their routers, or norms, round to float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import shardc
from checks import forced
from checks.training import losses_of
from zoo.case import ROUNDED
from zoo.text import EXPERTS, LLAMA, MOST, decoder

DEEPSEEK = dict(
    q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4,
    n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=0,
    moe_intermediate_size=16, num_key_value_heads=4,
)  # fmt: skip
LLAMA4 = dict(head_dim=8, intermediate_size_mlp=64, interleave_moe_layer_step=1, num_experts_per_tok=1)
MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": decoder(t.MixtralForCausalLM, t.MixtralConfig, **EXPERTS),
    "qwen2_moe": decoder(t.Qwen2MoeForCausalLM, t.Qwen2MoeConfig, **MOST, shared_expert_intermediate_size=16),
    "qwen3_moe": decoder(t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig, **MOST, head_dim=8),
    "gpt_oss": decoder(t.GptOssForCausalLM, t.GptOssConfig, **EXPERTS, head_dim=8, sliding_window=4),
    "deepseek_v3": decoder(t.DeepseekV3ForCausalLM, t.DeepseekV3Config, **{**LLAMA, **DEEPSEEK}),
}  # fmt: skip


def trained(model: nn.Module, call: Callable[..., Tensor], inputs: dict[str, Tensor]) -> list[float]:
    # of a small eps, rounding would decide signs
    return losses_of(call, inputs, torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-3))


def compare(model: nn.Module, inputs: dict[str, Tensor]) -> str:
    """Train on the mesh and alone; the code that ran."""
    alone = copy.deepcopy(model)
    compiled = shardc.compile(model, "dp=2,ep=2", inputs, hardware="h100", memory="unbounded")
    losses, right = trained(model, compiled, inputs), trained(alone, alone, inputs)
    assert right[-1] < right[0]
    torch.testing.assert_close(losses, right, rtol=ROUNDED, atol=ROUNDED)
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=ROUNDED, atol=ROUNDED)
    return compiled.code


@pytest.mark.parametrize("variant", forced.EXPERT_CALLS)
@pytest.mark.parametrize("name", MODELS)
def test_variants_train_like_the_single_device(name: str, variant: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    with forced.experts(variant):
        assert forced.EXPERT_CALLS[variant] in compare(model, inputs)


@pytest.mark.parametrize("variant", forced.EXPERT_CALLS)
def test_llama4_trains_like_the_single_device(variant: str, request: pytest.FixtureRequest) -> None:
    """It multiplies what goes into an expert by the score."""
    if variant != "exchanged" and not request.config.getoption("--whole-zoo"):
        pytest.skip("with --whole-zoo")
    torch.manual_seed(0)
    settings = {**LLAMA, **EXPERTS, **LLAMA4}
    model, inputs = decoder(t.Llama4ForCausalLM, t.Llama4TextConfig, **settings)()
    for parameter in model.parameters():
        if not parameter.detach().isfinite().all() or not parameter.detach().any():
            nn.init.normal_(parameter, std=0.1)
    with forced.experts(variant):
        assert forced.EXPERT_CALLS[variant] in compare(model, inputs)
