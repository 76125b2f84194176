"""Small models with random weights, as (name, builder): the builder gives a module that returns a loss, and inputs."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

Case = tuple[nn.Module, dict[str, Tensor]]
VOCABULARY = 128


class LanguageLoss(nn.Module):
    """A language model with its loss in the model's own dtype (transformers' loss casts the logits to float32)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(input_ids=input_ids).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def in_own_dtype(model: nn.Module) -> nn.Module:
    """transformers' RMSNorm sums in float32 in models of any dtype: no split of that sum could agree to 1e-10."""
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = MethodType(_rms_norm, part)
    return model


def _rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class HandGPT(nn.Module):
    """A decoder written by hand: fused qkv, dropout, tied output weights."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2, length: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.tokens.weight.T
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.one(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + F.dropout(self.out(mixed), 0.1, self.training)
        return x + self.down(F.gelu(self.up(self.two(x))))


def _text() -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (8, 16))
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}


def _images(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(8, 3, 32, 32, dtype=dtype), "labels": torch.randint(0, 8, (8,))}


def llama(dtype: torch.dtype) -> Case:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=64, use_cache=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return LanguageLoss(in_own_dtype(transformers.LlamaForCausalLM(config))).to(dtype), _text()


def gpt2(dtype: torch.dtype) -> Case:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LanguageLoss(transformers.GPT2LMHeadModel(config)).to(dtype), _text()


def bert(dtype: torch.dtype) -> Case:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64,
    )  # fmt: skip
    return LanguageLoss(transformers.BertForMaskedLM(config)).to(dtype), _text()


def vit(dtype: torch.dtype) -> Case:
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8,
        num_labels=8,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).to(dtype), _images(dtype)


def resnet(dtype: torch.dtype) -> Case:
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=8
    )
    return transformers.ResNetForImageClassification(config).to(dtype), _images(dtype)


def mixtral(dtype: torch.dtype) -> Case:
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, use_cache=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    # the default experts call a grouped product that has no float64
    config._experts_implementation = "batched_mm"
    return LanguageLoss(in_own_dtype(transformers.MixtralForCausalLM(config))).to(dtype), _text()


def hand_gpt(dtype: torch.dtype) -> Case:
    return HandGPT().to(dtype), _text()


MODELS: dict[str, Callable[[torch.dtype], Case]] = {
    f.__name__: f for f in (llama, gpt2, bert, vit, resnet, mixtral, hand_gpt)
}


def loss_of(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.loss  # type: ignore[attr-defined]
