"""Llama as transformers builds it, by size; the large ones stay on the meta device and are only planned.

shardc plan examples/llama.py --mesh dp=4,tp=8 --hardware h100
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "405b": {
        "hidden_size": 16384,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "intermediate_size": 53248,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 256,
        "max_position_embeddings": 256,
    },
}
ON_META = {"8b", "405b"}


class LlamaForCausalLMLoss(LlamaForCausalLM):
    """Llama that returns the loss alone: the logits of a long batch never leave the devices."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return super().forward(input_ids=input_ids, labels=labels, use_cache=False).loss


def build(size: str = "8b", layers: int | None = None, kind: type[LlamaForCausalLM] = LlamaForCausalLM) -> nn.Module:
    """The model of a named size, with another depth if `layers` is given. Sizes in ON_META hold no memory, in bf16."""
    settings = SIZES[size] | ({} if layers is None else {"num_hidden_layers": layers})
    config = LlamaConfig(**settings, use_cache=False)
    if size not in ON_META:
        return kind(config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return kind(config)
    finally:
        torch.set_default_dtype(before)


def example_inputs(batch: int, seq: int, size: str = "8b") -> dict[str, Tensor]:
    """Tokens and labels as keyword arguments."""
    shape, vocabulary = (batch, seq), SIZES[size]["vocab_size"]
    if size in ON_META:
        tokens = torch.empty(shape, dtype=torch.int64, device="meta")
        return {"input_ids": tokens, "labels": torch.empty_like(tokens)}
    tokens = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens.clone()}


def model() -> nn.Module:
    """What the command line plans: Llama-3-8B on the meta device."""
    return build("8b", kind=LlamaForCausalLMLoss)


def inputs() -> dict[str, Tensor]:
    """32 sequences of 4096 tokens."""
    return example_inputs(32, 4096)
