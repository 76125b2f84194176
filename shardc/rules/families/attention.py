"""Scaled dot-product attention as one operator.

Batch `b`, heads of keys `h`, the group of queries `g` that share keys, and queries `q` split freely. Where positions
count (a causal mask, a window), queries are the parted factor `r`. Keys are always the parted factor `s`. With dropout
all of them are parted: what a rank draws depends on its part.
"""

from __future__ import annotations

import torch

from shardc.rules.drawn import Drawn
from shardc.rules.families import attention_workspace
from shardc.rules.families.attention_ring import POSITIONS, rings
from shardc.rules.notation import Band, Rule, Send, Variant, letters, mark, named_dims, parse, rule
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.runtime.kernels.attention import parts
from shardc.runtime.kernels.attention.blocks import compute_dtype
from shardc.runtime.kernels.mersenne import STATE


class _Names:
    """The factors of one call, as words of a rule."""

    def __init__(
        self, q: torch.Tensor, draw: torch.Tensor | None, causal: bool, window: int, queries: str, keys: str
    ) -> None:
        self.group = q.dim() == 5
        parted = "" if draw is None else "~" if "sum" not in keys else ":sum~"
        self.batch, self.heads = f"b{parted}", [f"h{parted}", *([f"g{parted}"] if self.group else [])]
        self.query, self.key = queries, keys
        self.band = Band("r", "s", causal, window)
        self.rows = [self.batch, *self.heads, self.query]

    def queries(self, x: torch.Tensor, last: str) -> str:
        """A tensor with a row for every query."""
        return named_dims(x, [*self.rows, last])

    def keys(self, x: torch.Tensor, last: str) -> str:
        """A tensor with a row for every key."""
        return named_dims(x, [self.batch, self.heads[0], self.key, last])

    def sums(self, x: torch.Tensor) -> str:
        """A number for every query."""
        return named_dims(x, self.rows)

    def sinks(self, x: torch.Tensor) -> str:
        """A number for every head."""
        return named_dims(x, self.heads)

    def others(self, mask: torch.Tensor | None, sinks: torch.Tensor | None, draw: torch.Tensor | None) -> list[str]:
        """The operands that may be absent."""
        texts: list[str] = []
        if mask is not None:
            texts.append(named_dims(mask, [*self.rows, self.key][len(self.rows) + 1 - mask.dim() :]))
        if sinks is not None:
            texts.append(self.sinks(sinks))
        if draw is not None:
            texts.append(mark_whole(draw))
        return texts

    def numbers(self, of_queries: torch.Tensor | None, of_keys: torch.Tensor | None) -> list[str]:
        """What a mask is a function of: some numbers of each query and of each key."""
        pairs = (of_queries, "x!", self.query), (of_keys, "y!", self.key)
        return [named_dims(x, [whole, self.batch, name]) for x, whole, name in pairs if x is not None]

    def drawn(self, k: torch.Tensor, draw: torch.Tensor | None) -> Drawn | None:
        """The random numbers of dropout: one for every score, with the keys of all ranks."""
        factors = ("b", "h", "g", "r")
        return None if draw is None else Drawn(factors, k.shape[2], stream=draw.numel() == STATE)

    def flops(self, products: str) -> list[str]:
        """The matrix products: `d` is the head dim of queries and keys, `e` that of values."""
        factors = " ".join(_plain(word) for word in [*self.rows, self.key])
        return [f"{factors} {inner}" for inner in products]


def mark_whole(x: torch.Tensor) -> str:
    """A tensor of which every rank has all."""
    return mark(letters(x, "z"), range(x.dim()))


def _plain(word: str) -> str:
    return word.partition(":")[0].rstrip("~")


@rule(torch.ops.shardc.attention.default)
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor | None,
    draw: torch.Tensor | None, causal: bool, scale: float, window: int, softcap: float, dropout: float,
    of_queries: torch.Tensor | None = None, of_keys: torch.Tensor | None = None, sees: str = "",
) -> Rule:  # fmt: skip
    """Over split keys, the body weighs the result of each part by its log-sum-exp."""
    del scale, dropout, sees
    names = _Names(q, draw, causal, window, "r~", "s~")
    of = attention_workspace.Operands(q, k, v, mask, sinks, draw, causal, window, softcap, of_keys)
    needed = attention_workspace.in_parts(of, backward=False)
    result = names.sums(q.select(-1, 0))
    rows = tuple(_plain(name) for name in result.split() if name != "1")
    size = compute_dtype(q.dtype).itemsize
    sums = [Send(all_reduce, rows, size), Send(all_reduce, rows, size), Send(all_reduce, (*rows, "e"), size)]
    operands = [names.queries(q, "d!"), names.keys(k, "d!"), names.keys(v, "e!"), *names.others(mask, sinks, draw)]
    operands += names.numbers(of_queries, of_keys)
    return parse(
        f"{', '.join(operands)} -> {result} {'e!' if v.shape[3] != 1 else '1'}, {result}",
        flops=names.flops("de"), band=names.band, drawn=names.drawn(k, draw),
        workspace=attention_workspace.whole(of, backward=False),
        variants=[
            Variant("parts", parts.attention_in_parts, {"s": sums}, workspace=needed, folds=POSITIONS),
            *rings(of, backward=False),
        ],
    )  # fmt: skip


@rule(torch.ops.shardc.attention_backward.default)
def attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
    sinks: torch.Tensor | None, draw: torch.Tensor | None, out: torch.Tensor, logsumexp: torch.Tensor, causal: bool,
    scale: float, window: int, softcap: float, dropout: float, of_queries: torch.Tensor | None = None,
    of_keys: torch.Tensor | None = None, sees: str = "",
) -> Rule:  # fmt: skip
    """The gradients of keys and values sum over queries and the group, that of queries over keys, that of sinks over
    batch and queries."""
    del scale, dropout, sees
    names = _Names(q, draw, causal, window, "r:sum~", "s:sum~")
    of = attention_workspace.Operands(q, k, v, mask, sinks, draw, causal, window, softcap, of_keys)
    needed = attention_workspace.in_parts(of, backward=True)
    queries, keys, values = names.queries(q, "d!"), names.keys(k, "d!"), names.keys(v, "e!")
    others = names.others(mask, sinks, draw)
    operands = [
        names.queries(grad, "e!"), queries, keys, values, *others, names.queries(out, "e!"), names.sums(logsumexp),
    ]  # fmt: skip
    count = len(operands)
    operands += names.numbers(of_queries, of_keys)
    all_of = range(len(operands))
    of_sinks = [] if sinks is None else [0, 4 + (mask is not None), count - 2, count - 1]
    return parse(
        f"{', '.join(operands)} -> {queries}, {keys}, {values}, {'1' if sinks is None else names.sinks(sinks)}",
        [{0}], reads=[all_of, all_of, all_of, of_sinks], flops=names.flops("dddee"),
        multiplied=[0], band=names.band, drawn=names.drawn(k, draw),
        workspace=attention_workspace.whole(of, backward=True),
        variants=[
            Variant("parts", parts.attention_in_parts_backward, workspace=needed, folds=POSITIONS),
            *rings(of, backward=True),
        ],
    )  # fmt: skip
