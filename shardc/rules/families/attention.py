"""Scaled dot-product attention as one operator. Batch, heads and, without a causal mask, queries split freely.

With a causal mask, queries are the parted factor r. Keys are always the parted factor s.
"""

from __future__ import annotations

import torch

from shardc.rules.notation import Rule, Send, parse, rule
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.runtime.kernels import attention_parts
from shardc.runtime.kernels.attention import compute_dtype


def _query(causal: bool) -> str:
    return "r" if causal else "q"


def _flops(products: list[str], causal: bool) -> list[str]:
    """The matrix products: `d` is the head dim of queries and keys, `e` that of values."""
    return [f"b h {_query(causal)} s {inner}" for inner in products]


def _mask(mask: torch.Tensor | None, query: str, keys: str) -> str:
    if mask is None:
        return ""
    names = ["b", "h", query, keys][4 - mask.dim() :]
    return ", " + " ".join("1" if size == 1 else name for size, name in zip(mask.shape, names, strict=True))


def _named(x: torch.Tensor, text: str) -> str:
    return " ".join("1" if size == 1 else name for size, name in zip(x.shape, text.split(), strict=True))


@rule(torch.ops.shardc.attention.default)
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> Rule:
    """Over split keys, the body weighs the result of each part by its log-sum-exp."""
    del scale
    query = "r~" if causal else "q"
    result = _named(q, f"b h {query} 1").rsplit(" ", 1)[0]
    rows = tuple(name.rstrip("~") for name in result.split() if name != "1")
    size = compute_dtype(q.dtype).itemsize
    sums = [Send(all_reduce, rows, size), Send(all_reduce, rows, size), Send(all_reduce, (*rows, "e"), size)]
    return parse(
        f"{_named(q, f'b h {query} d!')}, {_named(k, 'b h s~ d!')}, {_named(v, 'b h s~ e!')}{_mask(mask, query, 's~')}"
        f" -> {result} {'e!' if v.shape[3] != 1 else '1'}, {result}",
        flops=_flops(["d", "e"], causal), body=attention_parts.attention_in_parts, sends={"s": sums},
    )  # fmt: skip


@rule(torch.ops.shardc.attention_backward.default)
def attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
    out: torch.Tensor, logsumexp: torch.Tensor, causal: bool, scale: float,
) -> Rule:  # fmt: skip
    """The gradients of keys and values sum over queries, that of queries over keys."""
    del scale
    query, keys = "r:sum~" if causal else "q", "s:sum~"
    queries, keyed, values = _named(q, f"b h {query} d!"), _named(k, f"b h {keys} d!"), _named(v, f"b h {keys} e!")
    outputs, grads = _named(out, f"b h {query} e!"), _named(grad, f"b h {query} e!")
    summed = _named(logsumexp, f"b h {query}")
    return parse(
        f"{grads}, {queries}, {keyed}, {values}{_mask(mask, query, keys)}, {outputs}, {summed}"
        f" -> {queries}, {keyed}, {values}",
        [{0}], flops=_flops(["d", "d", "d", "e", "e"], causal), body=attention_parts.attention_in_parts_backward,
        multiplied=[0],
    )  # fmt: skip
