"""Variants of attention, losses over a split vocabulary, and experts over gloo: what a rank holds at most, beside what
the plan predicts, within 5 %. For ranks.py."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import shardc
from checks import forced
from checks.meter import metered
from samples.causal_decoder import CausalDecoder
from shardc.rules.families import attention_workspace

NEAR = 0.05
attention_workspace.inside_kernel = lambda *_: []  # which tests/unit/rules/test_workspace.py compares


class Documents(nn.Module):
    """Packed sequences, split along their length."""

    def __init__(self, width=64):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x, documents):
        x = shardc.constrain(x, "-,x,-")
        q, k, v = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in self.parts[:3])
        places = torch.arange(x.shape[1])
        mask = (documents[:, None, :, None] == documents[:, None, None, :]) & (places[:, None] >= places)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.parts[3](shardc.constrain(out.transpose(1, 2).flatten(2), "-,x,-")).square().mean()


class Losses(nn.Module):
    """Probabilities over a vocabulary, in three losses."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 4096, bias=False)

    def forward(self, x, labels):
        logits = self.head(x)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        return loss + F.softmax(logits, -1).square().sum(-1).mean() + 1e-4 * logits.logsumexp(-1).square().mean()


class Experts(nn.Module):
    """Experts of which every token takes all, so that each gets as many rows as the plan reckons with."""

    def __init__(self):
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=4)
        self.layers = nn.ModuleList(MixtralExperts(config) for _ in range(2))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)

    def forward(self, x, ids):
        for layer in self.layers:
            x = x + layer(x, ids, torch.ones_like(ids, dtype=x.dtype))
        return x.square().mean()


def decoder(sequence):
    model = CausalDecoder(sequence=sequence, width=64, heads=4, kv_heads=4, vocabulary=96, layers=2)
    return model, (torch.randint(0, 96, (2, 512)),)


def packed():
    return Documents(), (torch.randn(1, 4096, 64), (torch.arange(4096) // 3000).unsqueeze(0))


def experts():
    return Experts(), (torch.randn(512, 64), torch.arange(4).repeat(512, 1))


CASES = {
    "ring": (lambda: decoder("x"), forced.attention(forced.ring("x")), {}),
    "documents, ring": (packed, forced.attention(forced.ring("x")), {}),
    "vocabulary": (
        lambda: (Losses(), (torch.randn(128, 16), torch.randint(0, 4096, (128,)))), nullcontext(),
        {"head.weight": "x,-"},
    ),
    "experts in parts": (experts, forced.experts("in_parts"), {}),
    "experts exchanged": (experts, forced.experts("exchanged"), {}),
}  # fmt: skip


def checked(name):
    make, forcing, constraints = CASES[name]
    torch.manual_seed(0)
    model, inputs = make()
    with forcing:
        model = shardc.shard(model, mesh="x=4", hardware="cpu", memory="unbounded", constraints=constraints)
        model(*inputs).backward()
    model.zero_grad()
    meters = metered(model.compiled.executable.module)
    model(*inputs).backward()
    (meter,) = meters.values()
    peak, memory = torch.tensor(meter.peak), model.plan.memory
    dist.all_reduce(peak, dist.ReduceOp.MAX)  # a plan speaks of the rank that holds most
    measured = int(peak)
    predicted = memory.peak - memory.parts.get("optimizer state", 0.0)
    near = abs(predicted - measured) <= NEAR * measured
    print(f"{name}: {predicted:.0f} predicted, {measured:.0f} measured ({predicted / measured:.3f})", flush=True)
    return near


far = [name for name in CASES if not checked(name)]
assert not far, far
print("peaks as predicted")
