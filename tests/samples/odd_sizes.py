"""A small decoder whose sizes meshes do not divide, and hardware on which every split pays."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardc.cost.hardware import Hardware, Link

DIVIDES = Hardware("slow", {"float32": 1e6}, 1e6, 1e-9, 64, Link(0.0, 1e15), Link(0.0, 1e15))
"""Arithmetic and memory cost much, links nothing: whatever can be split is split."""


class Decoder(nn.Module):
    """Five heads, 57 words, 30 channels, 50 hidden: two, three, four and eight ranks divide hardly any of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(57, 30), nn.LayerNorm(30), nn.Linear(30, 57)
        self.query, self.key, self.value, self.out = (nn.Linear(30, 30) for _ in range(4))
        self.up, self.down = nn.Linear(30, 50), nn.Linear(50, 30)

    def forward(self, words: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(words)
        normal = self.norm(x)
        q, k, v = (f(normal).unflatten(-1, (5, 6)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def words(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random inputs of a `Decoder`."""
    return torch.randint(0, 57, (batch, length)), torch.randint(0, 57, (batch, length))


def train(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of one call, and all gradients."""
    model.zero_grad()
    loss = model(*inputs)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]
