"""Layers of GPT-3 as in Korthikanti et al. 2022 ("Reducing activation recomputation in large transformer models"), with
attention written out: scores, softmax and their product are values of their own. On the meta device."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WIDTH, HEADS, LENGTH, WORDS = 12288, 96, 2048, 51200


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop1, self.drop2 = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS) + mask, -1)
        x = x + self.drop1(self.proj((weights @ v).transpose(1, 2).flatten(2)))
        return x + self.drop2(self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh")))


class PaperGPT(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels.flatten())


def paper_gpt(layers: int, batch: int) -> tuple[PaperGPT, tuple[Tensor, Tensor, Tensor]]:
    with torch.device("meta"):
        ids = torch.zeros(batch, LENGTH, dtype=torch.long)
        return PaperGPT(layers).bfloat16(), (ids, ids, torch.zeros(LENGTH, LENGTH, dtype=torch.bfloat16))


def megatron(layers: int) -> dict[str, tuple[str | None, ...]]:
    """Constraints for Megatron's tensor parallelism over `tp`, activations between layers whole."""
    columns = {f"*.{name}.weight": ("tp", None) for name in ("q", "k", "v", "up")}
    rows = {f"*.{name}.weight": (None, "tp") for name in ("proj", "down")}
    return columns | rows | {f"layers.{i}": (None, None, None) for i in range(layers)}
