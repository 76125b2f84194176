"""The models of textbooks on parallelism: a two-layer MLP and a transformer of two blocks."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardc.cost.hardware import Hardware, hardware


class MLP(nn.Module):
    """Two matrix products and a loss."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).float().square().mean()


class Logits(MLP):
    """The same without the loss."""

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)


class Block(nn.Module):
    """A transformer's block: attention and MLP, each behind a norm and added to the residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm1(x)
        q, k, v = (part(normal).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Two blocks and a loss."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).float().square().mean()


def without_overlap(name: str) -> Hardware:
    """A device that hides nothing beneath what it computes, as derivations by hand have it."""
    device = hardware(name)
    return replace(device, inside=replace(device.inside, overlap=0.0), between=replace(device.between, overlap=0.0))
