"""A causal decoder: positions, rotary tables, attention, a loss over labels shifted by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc


def laid(x: Tensor, spec: str | None) -> Tensor:
    return x if spec is None else shardc.constrain(x, spec)


class Attention(nn.Module):
    """`batch` and `sequence` say by which axes these dims must be split where attention reads and writes."""

    def __init__(self, width: int, heads: int, kv_heads: int, batch: str, sequence: str | None) -> None:
        super().__init__()
        self.spec = None if sequence is None else f"{batch},-,{sequence},-"
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, heads, self.size).transpose(1, 2)
            for layer, heads in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        q, k = (one * cos + _turned(one) * sin for one in (q, k))
        q, k, v = (laid(one, self.spec) for one in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        out = laid(out, self.spec)
        return self.o(out.transpose(1, 2).reshape(batch, length, -1))


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, batch: str, sequence: str | None) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads, kv_heads, batch, sequence)
        self.up, self.down = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.before(x), cos, sin)
        return x + self.down(F.silu(self.up(self.between(x))))


class CausalDecoder(nn.Module):
    """The mean cross-entropy of the next token; with `logits`, those too. `batch` and `sequence` say by which axes
    these dims must be split, before and after every attention and in the logits; else nothing is asked."""

    def __init__(
        self, batch: str = "-", sequence: str | None = None, width: int = 8, heads: int = 2, kv_heads: int = 1,
        vocabulary: int = 24, layers: int = 2, logits: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.spec = None if sequence is None else f"{batch},{sequence},-"
        self.logits, self.size = logits, width // heads
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, kv_heads, batch, sequence) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = laid(self.embed(tokens), self.spec)
        cos, sin = self._rotary(tokens.shape[1], x)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = laid(self.head(self.norm(x)), self.spec)
        labels = F.pad(tokens, (0, 1), value=-100)[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return (loss, logits) if self.logits else loss

    def _rotary(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        speeds = 100.0 ** (-torch.arange(0, self.size, 2, device=like.device) / self.size)
        angles = torch.arange(length, device=like.device).unsqueeze(1) * speeds
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
