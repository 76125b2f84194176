"""Captured transformers and vision models compute what the models compute, and say where everything comes from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from checks.captured import assert_same, execute, operators, verify
from shardc.capture.trace import capture
from shardc.ir.facts import origin_of
from shardc.ir.program import Role, value_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TOKENS = torch.arange(2 * 8).reshape(2, 8) * 5 % 32


def llama(**config: Any) -> nn.Module:
    config = {**SMALL, "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 16, **config}
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(use_cache=False, **config))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=16, use_cache=False)
    return hf.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    torch.manual_seed(0)
    return hf.BertForMaskedLM(hf.BertConfig(vocab_size=32, max_position_embeddings=16, **SMALL))


def vit() -> nn.Module:
    torch.manual_seed(0)
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, **SMALL))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    return hf.ResNetForImageClassification(config)


def mixtral(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SMALL, "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 16}
    return hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=4, use_cache=False, **sizes, **config))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, s, w = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(self.ln1(x)).split(w, dim=-1))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, w))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(32, 16), nn.Embedding(8, 16)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(16, 4, dropout) for _ in range(2))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:
        x = self.drop(self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_llama() -> None:
    program = verify(llama(), input_ids=TOKENS, labels=TOKENS)
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    named = [n for n in calls if origin_of(n).module]
    assert len(named) >= 0.95 * len(calls)
    assert all(origin_of(n).source for n in calls)
    ops = operators(program)
    assert ops["shardc.attention.default"] == ops["shardc.attention_backward.default"] == 2
    up = next(n for n in calls if "mlp_up_proj_weight" in str(n.args))
    assert origin_of(up).module == "model.layers.0.mlp.up_proj" and origin_of(up).source.startswith(
        "modeling_llama.py:"
    )
    backward = next(n for n in calls if n.target is torch.ops.shardc.attention_backward.default)
    assert origin_of(backward).module == "model.layers.1.self_attn" and origin_of(backward).phase == "backward"
    assert isinstance(
        pytree.tree_unflatten([None] * program.out_spec.num_leaves, program.out_spec), hf.utils.ModelOutput
    )


def test_llama_with_padding_mask() -> None:
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 6:] = 0
    program = verify(llama(), input_ids=TOKENS, labels=TOKENS, attention_mask=mask)
    assert operators(program)["shardc.attention.default"] == 2


def test_gpt2_is_tied() -> None:
    program = verify(gpt2().eval(), input_ids=TOKENS, labels=TOKENS)
    assert program.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert sum(port.name == "transformer.wte.weight" for port in program.inputs) == 1


def test_key_value_caches_come_back() -> None:
    model = llama().double()
    options = {"input_ids": TOKENS, "labels": TOKENS, "use_cache": True}
    program = capture(model, (), options)
    output, _, _ = execute(program, model, (), options)
    expected = model(**options).past_key_values
    assert type(output.past_key_values) is type(expected)
    assert_same(output.past_key_values.layers[1].keys, expected.layers[1].keys)


def test_checkpointing_is_ignored() -> None:
    """AOTAutograd switches saved-tensor hooks off: what to recompute is the plan's decision."""
    model = llama().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert operators(verify(model, input_ids=TOKENS, labels=TOKENS))["shardc.attention.default"] == 2


def test_dropout_draws_the_same_random_numbers() -> None:
    verify(gpt2(), input_ids=TOKENS, labels=TOKENS)
    program = verify(GPT(), TOKENS, TOKENS)
    assert operators(program)["shardc.attention_draw.default"] == operators(program)["shardc.attention.default"] > 0
    assert program.tied == {"head.weight": "tokens.weight"}


def test_bert() -> None:
    verify(bert().eval(), input_ids=TOKENS, labels=TOKENS)


def test_vit() -> None:
    verify(vit(), pixel_values=torch.randn(2, 3, 8, 8, dtype=torch.float64), labels=torch.tensor([0, 1]))


def test_resnet_updates_its_buffers() -> None:
    program = verify(resnet(), pixel_values=torch.randn(2, 3, 16, 16, dtype=torch.float64), labels=torch.tensor([0, 1]))
    assert sum(port.name.endswith("running_mean") for port in program.outputs) == 6


@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_mixtral(experts: str) -> None:
    model = mixtral(experts_implementation=experts)
    before = model.config._experts_implementation
    verify(model, input_ids=TOKENS, labels=TOKENS)
    assert model.config._experts_implementation == before


def test_several_outputs_without_a_loss() -> None:
    program = verify(GPT(0.0), TOKENS, scalar=False)
    assert [port.role for port in program.inputs].count(Role.TANGENT) == 1
    assert operators(program)["shardc.attention.default"] == 2


def test_forward_only() -> None:
    module = GPT(0.0).double().eval()
    program = capture(module, (TOKENS,), grad=False)
    got, mutations, grads = execute(program, module, (TOKENS,), {})
    torch.testing.assert_close(got, module(TOKENS))
    assert not mutations and not grads
    assert {origin_of(node).phase for node in program.graph.nodes if node.op == "call_function"} == {"forward"}
    frozen = capture(copy.deepcopy(module).requires_grad_(False), (TOKENS,))
    assert len(frozen.graph.nodes) == len(program.graph.nodes)


def test_meta_models_give_the_same_graph() -> None:
    real = capture(llama(), (), {"input_ids": TOKENS, "labels": TOKENS})
    with torch.device("meta"):
        model = llama()
    tokens = TOKENS.to("meta")
    meta = capture(model, (), {"input_ids": tokens, "labels": tokens})
    assert [str(n.target) for n in meta.graph.nodes] == [str(n.target) for n in real.graph.nodes]
    assert all(value_of(n).device.type == "cpu" for n in meta.placeholders)
