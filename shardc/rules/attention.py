"""Scaled dot-product attention as one operator: batch and heads pass; queries pass unless the mask is causal."""

from __future__ import annotations

import torch

from shardc.rules.notation import Rule, parse, rule

FORWARD = ["b h q k d", "b h q k e"]
BACKWARD = ["b h q k d", "b h q k d", "b h q k d", "b h q k e", "b h q k e"]


def _mask(mask: torch.Tensor | None, query: str) -> str:
    if mask is None:
        return ""
    names = ["b", "h", query, "k!"][4 - mask.dim() :]
    return ", " + " ".join("1" if size == 1 else name for size, name in zip(mask.shape, names, strict=True))


def _named(x: torch.Tensor, text: str) -> str:
    return " ".join("1" if size == 1 else name for size, name in zip(x.shape, text.split(), strict=True))


@rule(torch.ops.shardc.attention.default)
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> Rule:
    del scale
    query = "q!" if causal else "q"
    result = _named(q, f"b h {query} 1").rsplit(" ", 1)[0]
    return parse(
        f"{_named(q, f'b h {query} d!')}, {_named(k, 'b h k! d!')}, {_named(v, 'b h k! e!')}{_mask(mask, query)}"
        f" -> {result} {'e!' if v.shape[3] != 1 else '1'}, {result}",
        flops=FORWARD,
    )


@rule(torch.ops.shardc.attention_backward.default)
def attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
    out: torch.Tensor, logsumexp: torch.Tensor, causal: bool, scale: float,
) -> Rule:  # fmt: skip
    """The gradients of keys and values sum over queries."""
    del scale
    query = "q!" if causal else "q"
    queries, keys, values = _named(q, f"b h {query} d!"), _named(k, "b h k! d!"), _named(v, "b h k! e!")
    made = _named(out, f"b h {query} e!")
    grads = _named(grad, f"b h {query} e!")
    return parse(
        f"{grads}, {queries}, {keys}, {values}{_mask(mask, query)}, {made}, {_named(logsumexp, f'b h {query}')}"
        f" -> {queries}, {keys}, {values}",
        [{0}],
        flops=BACKWARD,
    )
