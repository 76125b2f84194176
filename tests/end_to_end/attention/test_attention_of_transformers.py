"""transformers' attention by its three paths: one operator a layer, no mask of all pairs, right gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import shardc
from shardc.capture.trace import capture
from shardc.ir.program import Program, value_of

LENGTH, LAYERS, WINDOW = 48, 2, 7
SIZES = dict(
    vocab_size=16, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=16,
    max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
DECODER = {**SIZES, "num_key_value_heads": 2, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {**DECODER, "head_dim": 4}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "batched_mm"}
LATENT = dict(
    num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
    first_k_dense_replace=LAYERS,
)  # fmt: skip
LAYER_TYPES = ["sliding_attention", "full_attention"]

Case = tuple[Any, Any, dict[str, Any], str, list[int]]
CASES: dict[str, Case] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, DECODER, "eager sdpa flex_attention", [0, 0]),
    "mistral": (
        hf.MistralForCausalLM, hf.MistralConfig, {**DECODER, "sliding_window": WINDOW}, "eager sdpa flex_attention",
        [WINDOW] * 2,
    ),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, SMALL, "eager sdpa", [0, 0]),
    "gemma2": (
        hf.Gemma2ForCausalLM, hf.Gemma2Config, {**SMALL, "sliding_window": WINDOW}, "eager flex_attention", [WINDOW, 0],
    ),
    "gemma3": (
        hf.Gemma3ForCausalLM, hf.Gemma3TextConfig,
        {**SMALL, "sliding_window": WINDOW, "layer_types": LAYER_TYPES}, "eager sdpa", [WINDOW, 0],
    ),
    "gpt_oss": (
        hf.GptOssForCausalLM, hf.GptOssConfig, {**SMALL, **EXPERTS, "sliding_window": WINDOW}, "eager", [WINDOW, 0],
    ),
    "deepseek_v3": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config, {**DECODER, **LATENT}, "eager sdpa", [0, 0]),
    "bloom": (
        hf.BloomForCausalLM, hf.BloomConfig,
        dict(vocab_size=16, hidden_size=16, n_layer=LAYERS, n_head=4, use_cache=False), "eager", [0, 0],
    ),
    "bert": (hf.BertForMaskedLM, hf.BertConfig, SIZES, "eager sdpa", [0, 0]),
}  # fmt: skip


def build(name: str, implementation: str) -> nn.Module:
    model, config, settings, _, _ = CASES[name]
    torch.manual_seed(0)
    made = model._from_config(config(**settings), attn_implementation=implementation).double()
    made.config._experts_implementation = "batched_mm"  # the grouped product of the default has no float64
    return made


def inputs(name: str) -> dict[str, Tensor]:
    ids = torch.arange(2 * LENGTH).reshape(2, LENGTH) * 5 % 13 + 3
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "labels": ids, **({"attention_mask": mask} if name == "bert" else {})}


def squares(program: Program) -> list[str]:
    nodes = [n for n in program.graph.nodes if n.op != "output" and isinstance(value_of(n), Tensor)]
    return [n.name for n in nodes if list(value_of(n).shape).count(LENGTH) > 1]


PATHS = [(name, path) for name, case in CASES.items() for path in case[3].split()]


@pytest.mark.parametrize(("name", "path"), PATHS)
def test_every_layer_is_one_operator_without_a_mask_of_all_pairs(name: str, path: str) -> None:
    program = capture(build(name, path), (), inputs(name))
    calls = [n for n in program.graph.nodes if n.target is torch.ops.shardc.attention.default]
    assert [n.args[8] for n in calls] == CASES[name][4]
    assert all(n.args[6] is (name != "bert") for n in calls)
    assert squares(program) == []


MESHES = [
    ("llama", "eager", "tp=2"),
    ("mistral", "sdpa", "dp=2"),
    ("gemma2", "flex_attention", "tp=2"),
    ("gpt_oss", "eager", "dp=2"),
]


@pytest.mark.parametrize(("name", "path", "mesh"), MESHES)
def test_values_and_gradients_on_a_mesh_equal_eager_mode(name: str, path: str, mesh: str) -> None:
    """Eager's softmax is computed in float32 here, and the operator's in float64."""
    model, given = build(name, path), inputs(name)
    expected = build(name, "eager")
    expected(**given).loss.backward()
    compiled = shardc.shard(copy.deepcopy(model), mesh=mesh)
    compiled(**given).loss.backward()
    grads = dict(expected.named_parameters())
    for path_of, parameter in compiled.named_parameters():
        wanted = grads[path_of].grad
        assert wanted is not None and parameter.grad is not None, path_of
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-6)


def test_packed_positions_are_packed() -> None:
    """Positions that the model is given tell where sequences start: only a run knows them."""
    model, given = build("llama", "sdpa"), inputs("llama")
    given["position_ids"] = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None].expand(2, -1)
    expected = copy.deepcopy(model)
    loss = expected(**given).loss
    compiled = shardc.compile(model, "dp=2", given)
    torch.testing.assert_close(compiled(**given).loss, loss, rtol=1e-6, atol=1e-7)
    plain = {**given, "position_ids": torch.arange(LENGTH)[None].expand(2, -1)}
    torch.testing.assert_close(compiled(**plain).loss, expected(**plain).loss, rtol=1e-6, atol=1e-7)
    assert not torch.isclose(expected(**plain).loss, loss)
