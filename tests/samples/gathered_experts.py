"""Layers that gather the weights of experts for each token, as people write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, INNER, COUNT = 8, 12, 4


class Gathered(nn.Module):
    """A router, and weights of all experts in one tensor each."""

    def __init__(self, k: int, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.gate, self.k = nn.Linear(D, COUNT, bias=False), k
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(COUNT, *shape) * 0.3))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, ids = self.gate(x).softmax(-1).topk(self.k, dim=-1)
        return scores / scores.sum(-1, keepdim=True), ids


class GptFast(Gathered):
    """gpt-fast's Mixtral."""

    w1: Tensor
    w2: Tensor
    w3: Tensor

    def __init__(self) -> None:
        super().__init__(2, w1=(INNER, D), w2=(D, INNER), w3=(INNER, D))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, D)
        scores, ids = self.route(flat)
        x1 = F.silu(torch.einsum("ti,taoi -> tao", flat, self.w1[ids]))
        x3 = torch.einsum("ti, taoi -> tao", flat, self.w3[ids])
        results = torch.einsum("tao, taio -> tai", x1 * x3, self.w2[ids])
        return torch.einsum("tai,ta -> ti", results, scores).view(x.shape)


class GptOss(Gathered):
    """The reference of GPT-OSS: biases, and gates between what they gate."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __init__(self) -> None:
        super().__init__(2, w1=(2 * INNER, D), b1=(2 * INNER,), w2=(D, INNER), b2=(D,))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, D)
        scores, ids = self.route(flat)
        t = torch.einsum("beck,bk->bec", self.w1[ids, ...], flat) + self.b1[ids, ...]
        gate, up = t[..., ::2].clamp(max=7.0), t[..., 1::2].clamp(-7.0, 7.0)
        t = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        t = torch.einsum("beck,bek->bec", self.w2[ids, ...], t)
        t += self.b2[ids, ...]
        return torch.einsum("bec,be->bc", t, scores).view(x.shape)


class OneChoice(Gathered):
    """One expert a token, by `bmm`, of tokens in two dims."""

    up: Tensor
    down: Tensor

    def __init__(self) -> None:
        super().__init__(1, up=(D, INNER), down=(INNER, D))

    def forward(self, x: Tensor) -> Tensor:
        scores, ids = self.gate(x).softmax(-1).max(-1)
        hidden = torch.matmul(x.unsqueeze(-2), self.up[ids]).relu().square()
        return torch.matmul(hidden, self.down[ids]).squeeze(-2) * scores.unsqueeze(-1)


class RowOfEachChoice(Gathered):
    """Rows are repeated for each choice; gates and what they gate are halves."""

    up: Tensor
    down: Tensor

    def __init__(self) -> None:
        super().__init__(2, up=(D, 2 * INNER), down=(INNER, D))

    def forward(self, x: Tensor) -> Tensor:
        scores, ids = self.route(x)
        rows = x.unsqueeze(2).expand(-1, -1, self.k, -1)
        value, gate = torch.einsum("bskd,bskdf->bskf", rows, self.up[ids]).chunk(2, -1)
        made = torch.einsum("bskf,bskfd->bskd", value * F.gelu(gate), self.down[ids])
        return (made * scores.unsqueeze(-1)).sum(2)


LAYERS = {"gpt-fast": GptFast, "gpt-oss": GptOss, "one choice": OneChoice, "repeated rows": RowOfEachChoice}
