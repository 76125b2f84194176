"""Twenty-four models at their published sizes, on the meta device in bfloat16: what `planner.py --only models` plans.

model, inputs = build("Falcon-180B")     # holds no memory; called with the inputs it gives the loss alone
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
MESHES = ("dp=64", "dp=8,tp=8", "dp=8,cp=2,tp=8", "a=2,b=2,c=2,d=8")
"""The meshes of one to four axes."""
SMALL_MESHES = ("dp=8", "dp=4,tp=4", "dp=2,cp=2,tp=4", "a=2,b=2,c=2,d=2")
"""The same for models of fewer than some 15 billion parameters."""


class WithLoss(nn.Module):
    """A model of transformers that gives its loss."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs, **self.options).loss


def decoder(name: str, batch: int, sequence: int, config: str = "", **sizes: Any) -> tuple[nn.Module, Inputs]:
    """`<name>ForCausalLM` with the sizes in its config, and tokens."""
    import transformers

    made = getattr(transformers, f"{config or name}Config")(use_cache=False, **sizes)
    kind = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    model = kind(made)
    return WithLoss(model.bfloat16(), use_cache=False), tokens("input_ids", "labels", shape=(batch, sequence))


def tokens(*names: str, shape: tuple[int, int]) -> Inputs:
    return {name: torch.empty(shape, dtype=torch.int64) for name in names}


def gpt2() -> tuple[nn.Module, Inputs]:
    return decoder("GPT2", 64, 1024, n_embd=1600, n_layer=48, n_head=25)


def bert() -> tuple[nn.Module, Inputs]:
    from transformers import BertConfig, BertForMaskedLM

    sizes: dict[str, Any] = {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096
    }  # fmt: skip
    return WithLoss(BertForMaskedLM(BertConfig(**sizes)).bfloat16()), tokens("input_ids", "labels", shape=(512, 512))


def t5() -> tuple[nn.Module, Inputs]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=1024, d_kv=128, d_ff=65536, num_layers=24, num_heads=128, decoder_start_token_id=0, pad_token_id=0
    )
    return WithLoss(T5ForConditionalGeneration(config).bfloat16(), use_cache=False), tokens(
        "input_ids", "labels", shape=(128, 512)
    )


def whisper() -> tuple[nn.Module, Inputs]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=1280, encoder_layers=32, decoder_layers=32, encoder_attention_heads=20, decoder_attention_heads=20,
        encoder_ffn_dim=5120, decoder_ffn_dim=5120, vocab_size=51866, num_mel_bins=128, use_cache=False,
    )  # fmt: skip
    heard = torch.empty(64, 128, 3000, dtype=torch.bfloat16)
    model = WithLoss(WhisperForConditionalGeneration(config).bfloat16(), use_cache=False)
    return model, {"input_features": heard, **tokens("labels", shape=(64, 448))}


def vit() -> tuple[nn.Module, Inputs]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=6144, num_hidden_layers=48, num_attention_heads=48, intermediate_size=24576, patch_size=14,
        image_size=224, num_labels=1000,
    )  # fmt: skip
    pictures = torch.empty(512, 3, 224, 224, dtype=torch.bfloat16)
    labels = torch.empty(512, dtype=torch.int64)
    return WithLoss(ViTForImageClassification(config).bfloat16()), {"pixel_values": pictures, "labels": labels}


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.second = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1))
        self.shortcut = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.second(self.first(x))


class UNet(nn.Module):
    """A U-Net as diffusion models have it, without attention; predicts noise and gives the mean square of its error."""

    def __init__(self, width: int = 512, times: tuple[int, ...] = (1, 2, 4, 4), blocks: int = 3) -> None:
        super().__init__()
        widths = [width * each for each in times]
        self.entry = nn.Conv2d(4, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        kept, now = [width], width
        for level, out in enumerate(widths):
            for _ in range(blocks):
                self.down.append(Residual(now, out))
                now = out
                kept.append(now)
            if level < len(widths) - 1:
                self.down.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
                kept.append(now)
        self.middle = nn.Sequential(Residual(now, now), Residual(now, now))
        for level, out in reversed([*enumerate(widths)]):
            for _ in range(blocks + 1):
                self.up.append(Residual(now + kept.pop(), out))
                now = out
            if level:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(now, now, 3, padding=1)))
        self.exit = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, 4, 3, padding=1))

    def forward(self, noisy: Tensor, noise: Tensor) -> Tensor:
        x = self.entry(noisy)
        kept = [x]
        for one in self.down:
            x = one(x)
            kept.append(x)
        x = self.middle(x)
        for one in self.up:
            x = one(torch.cat((x, kept.pop()), dim=1) if isinstance(one, Residual) else x)
        return (self.exit(x) - noise).square().mean()


def u_net() -> tuple[nn.Module, Inputs]:
    pictures = torch.empty(256, 4, 64, 64, dtype=torch.bfloat16)
    return UNet().bfloat16(), {"noisy": pictures, "noise": torch.empty_like(pictures)}


class DLRM(nn.Module):
    """Tables of embeddings, products of each two of them, and two small networks (Naumov et al. 2019)."""

    def __init__(self, tables: int = 26, rows: int = 4_000_000, width: int = 128) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in range(tables))
        self.bottom = _mlp(13, 512, 256, width)
        pairs = (tables + 1) ** 2
        self.top = _mlp(pairs + width, 1024, 1024, 512, 256, 1)

    def forward(self, dense: Tensor, sparse: Tensor, clicked: Tensor) -> Tensor:
        low = self.bottom(dense)
        rows = [table(sparse[:, i]) for i, table in enumerate(self.tables)]
        each = torch.stack([low, *rows], dim=1)
        pairs = torch.bmm(each, each.transpose(1, 2)).flatten(1)
        logits = self.top(torch.cat((low, pairs), dim=1)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, clicked)


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, out in itertools.pairwise(widths):
        layers += [nn.Linear(width, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def dlrm() -> tuple[nn.Module, Inputs]:
    clicks = torch.empty(65536, dtype=torch.bfloat16)
    dense, sparse = torch.empty(65536, 13, dtype=torch.bfloat16), torch.empty(65536, 26, dtype=torch.int64)
    return DLRM().bfloat16(), {"dense": dense, "sparse": sparse, "clicked": clicks}


def llama(hidden: int, layers: int, heads: int, wide: int) -> Callable[[], tuple[nn.Module, Inputs]]:
    return lambda: decoder(
        "Llama", 64, 4096, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, intermediate_size=wide, vocab_size=128256,
    )  # fmt: skip


def of(name: str, config: str = "", **sizes: Any) -> Callable[[], tuple[nn.Module, Inputs]]:
    return lambda: decoder(name, 64, 4096, config, **sizes)


BUILDERS: Mapping[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "Llama-3-8B": llama(4096, 32, 32, 14336),
    "Llama-3-70B": llama(8192, 80, 64, 28672),
    "Llama-3-405B": llama(16384, 126, 128, 53248),
    "Qwen2-72B": of("Qwen2", hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
                    intermediate_size=29568, vocab_size=152064),
    "Qwen3-MoE-235B": of("Qwen3Moe", hidden_size=4096, num_hidden_layers=94, num_attention_heads=64,
                         num_key_value_heads=4, head_dim=128, moe_intermediate_size=1536, num_experts=128,
                         num_experts_per_tok=8, vocab_size=151936),
    "Gemma-2-27B": of("Gemma2", hidden_size=4608, num_hidden_layers=46, num_attention_heads=32, num_key_value_heads=16,
                      head_dim=128, intermediate_size=36864, vocab_size=256000),
    "Gemma-3-27B": of("Gemma3", "Gemma3Text", hidden_size=5376, num_hidden_layers=62, num_attention_heads=32,
                      num_key_value_heads=16, head_dim=128, intermediate_size=21504, vocab_size=262208),
    "Mistral-24B": of("Mistral", hidden_size=5120, num_hidden_layers=40, num_attention_heads=32, num_key_value_heads=8,
                      head_dim=128, intermediate_size=32768, vocab_size=131072, sliding_window=None),
    "Mixtral-8x7B": of("Mixtral"),
    "Mixtral-8x22B": of("Mixtral", hidden_size=6144, num_hidden_layers=56, num_attention_heads=48,
                        num_key_value_heads=8, intermediate_size=16384, vocab_size=32768),
    "DeepSeek-V3": of("DeepseekV3"),
    "GPT-OSS-120B": of("GptOss"),
    "OPT-175B": lambda: decoder("OPT", 64, 2048, hidden_size=12288, num_hidden_layers=96, num_attention_heads=96,
                                ffn_dim=49152, word_embed_proj_dim=12288),
    "Falcon-180B": lambda: decoder("Falcon", 64, 2048, hidden_size=14848, num_hidden_layers=80,
                                   num_attention_heads=232, num_kv_heads=8, new_decoder_architecture=True),
    "Bloom-176B": lambda: decoder("Bloom", 64, 2048, hidden_size=14336, n_layer=70, n_head=112),
    "GPT-2-XL": gpt2,
    "BERT-large": bert,
    "T5-11B": t5,
    "ViT-22B": vit,
    "U-Net-2B": u_net,
    "Whisper-large": whisper,
    "Mamba-2.8B": lambda: decoder("Mamba2", 64, 2048, hidden_size=2560, num_hidden_layers=64, num_heads=80,
                                  head_dim=64, n_groups=1, vocab_size=50288),
    "Llama-4-Scout": of("Llama4", "Llama4Text", intermediate_size_mlp=16384, num_local_experts=16,
                        interleave_moe_layer_step=1),
    "DLRM": dlrm,
}  # fmt: skip
_SMALL = {"Llama-3-8B", "GPT-2-XL", "BERT-large", "T5-11B", "U-Net-2B", "Whisper-large", "Mamba-2.8B", "DLRM"}


def meshes(name: str) -> tuple[str, ...]:
    """The meshes on which a model is planned, of one to four axes."""
    return SMALL_MESHES if name in _SMALL else MESHES


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A model, and the inputs of which it gives the loss."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    with torch.device("meta"):
        return BUILDERS[name]()


def billions(model: nn.Module) -> float:
    """Billions of parameters."""
    return math.fsum(parameter.numel() for parameter in model.parameters()) / 1e9
