"""flex_attention during a trace: the operator for attention, with what its functions do to scores as arguments.

    flex_attention(q, k, v, score_mod=alibi, block_mask=causal)
        ->    %bias = mul(%slopes, %distance);  %out, %lse = shardc.attention(%q, %k, %v, %bias, ..., True, ...)

`mask_mod` is evaluated on the positions, and gives a mask. `score_mod` runs on a stand-in for the score, which notes
what is done to it. What the operator has no argument for is traced as torch's own mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._higher_order_ops.flex_attention import math_attention
from torch.nn.attention import flex_attention as flex

from shardc.capture.torch_patches.attention.notes import Notes
from shardc.capture.torch_patches.attention.sdpa import AttentionOptions, attended, unrepeated
from shardc.capture.torch_patches.autocast import lowered
from shardc.errors import CaptureError


class _Unlike(Exception):
    """What is done to a score is nothing that the operator has an argument for."""


@dataclass(frozen=True)
class Score:
    """Stands in for a score: `softcap * tanh(scale * score) + bias` where `keep`, without the tanh if softcap is 0."""

    scale: float = 1.0
    softcap: float = 0.0
    bias: Tensor | None = None
    keep: Tensor | None = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Score:
        rule = _RULES.get(getattr(function, "__name__", ""))
        if rule is None or kwargs:
            raise _Unlike
        return rule(*args)

    def __add__(self, other: Any) -> Score:
        return _add(self, other)

    def __radd__(self, other: Any) -> Score:
        return _add(self, other)

    def __sub__(self, other: Any) -> Score:
        return _add(self, -other)

    def __mul__(self, other: Any) -> Score:
        return _mul(self, other)

    def __rmul__(self, other: Any) -> Score:
        return _mul(self, other)

    def __truediv__(self, other: Any) -> Score:
        return _mul(self, 1 / other)

    def __getattr__(self, name: str) -> Any:
        raise _Unlike


def _add(score: Any, other: Any) -> Score:
    if not isinstance(score, Score):
        score, other = other, score
    if not isinstance(other, (Tensor, int, float)):
        raise _Unlike
    return replace(score, bias=other if score.bias is None else score.bias + other)


def _sub(score: Any, other: Any) -> Score:
    if not isinstance(score, Score):
        raise _Unlike
    return _add(score, -other)


def _mul(score: Any, other: Any) -> Score:
    if not isinstance(score, Score):
        score, other = other, score
    if not isinstance(other, (int, float)) or other <= 0:
        raise _Unlike
    bias = None if score.bias is None else score.bias * other
    if score.softcap:
        return replace(score, softcap=score.softcap * other, bias=bias)
    return replace(score, scale=score.scale * other, bias=bias)


def _div(score: Any, other: Any) -> Score:
    if not isinstance(score, Score) or not isinstance(other, (int, float)):
        raise _Unlike
    return _mul(score, 1 / other)


def _tanh(score: Any) -> Score:
    if score.bias is not None or score.keep is not None or score.softcap:
        raise _Unlike
    return replace(score, softcap=1.0)


def _where(condition: Any, score: Any, other: Any) -> Score:
    if not isinstance(condition, Tensor):
        raise _Unlike
    if not isinstance(score, Score):
        score, other, condition = other, score, condition.logical_not()
    if not isinstance(other, (int, float)) or other != float("-inf"):
        raise _Unlike
    return replace(score, keep=condition if score.keep is None else score.keep & condition)


_RULES: dict[str, Callable[..., Score]] = {
    **dict.fromkeys(("add", "__add__", "__radd__"), _add),
    **dict.fromkeys(("sub", "__sub__", "rsub", "__rsub__"), _sub),
    **dict.fromkeys(("mul", "__mul__", "__rmul__"), _mul),
    **dict.fromkeys(("div", "__truediv__"), _div),
    "tanh": _tanh,
    "where": _where,
}


class FlexAttention:
    """What stands in the place of the operator that flex_attention calls."""

    def __init__(self, notes: Callable[[], Notes]) -> None:
        self._notes = notes
        self._sinks: Tensor | None = None

    @contextmanager
    def sinks(self, sinks: Tensor | None) -> Generator[None]:
        """Give every call one more key per head, whose value is zero, and whose score is `sinks`."""
        before, self._sinks = self._sinks, sinks
        try:
            yield
        finally:
            self._sinks = before

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, score_mod: Callable[..., Any], block_mask: tuple[Any, ...],
        scale: float, kernel_options: dict[str, Any], *_: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The result, and the log-sum-exp and the largest scores, which are empty where nobody asked for them."""
        if kernel_options["OUTPUT_MAX"]:
            raise CaptureError("flex_attention is asked for max_scores, which shardc has not: ask for lse at most")
        query, key, value = lowered(query), lowered(key), lowered(value)
        options = (
            None if kernel_options["OUTPUT_LOGSUMEXP"] else self._options(query, key, score_mod, block_mask, scale)
        )
        if options is None and self._sinks is None:
            return math_attention(query, key, value, score_mod, block_mask, scale, kernel_options)
        if options is None:
            raise CaptureError("flex_attention with sinks has a score_mod or a mask that shardc does not know")
        key, value, _times = unrepeated(self._notes(), key, value)
        out = attended(query, key, value, replace(options, sinks=self._sinks))
        return out, out.new_empty(0), out.new_empty(0)

    def _options(
        self, query: Tensor, key: Tensor, score_mod: Callable[..., Any], block_mask: tuple[Any, ...], scale: float
    ) -> AttentionOptions | None:
        """What score_mod and mask_mod do, as arguments of the operator; None if it has none for it, or they learn."""
        sizes = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
        try:
            score = _evaluated(lambda *positions: score_mod(Score(scale), *positions), sizes)
        except _Unlike:
            return None
        keep = _evaluated(lambda *positions: Score(keep=block_mask[-1](*positions)), sizes).keep
        assert keep is not None
        keep = keep if score.keep is None else score.keep & keep
        if score.bias is not None and score.bias.requires_grad:
            return None
        mask = keep if score.bias is None else torch.where(keep, score.bias, float("-inf"))
        factor = score.scale * score.softcap if score.softcap else score.scale
        return AttentionOptions(mask, scale=factor, softcap=score.softcap)


def _evaluated(function: Callable[..., Any], sizes: tuple[int, ...]) -> Score:
    """What a function of single positions in batch, heads, queries and keys gives, with its tensors of `sizes`."""
    found: list[Score] = []

    def tensors(*positions: Tensor) -> tuple[Tensor, ...]:
        score = function(*positions)
        if not isinstance(score, Score):
            raise _Unlike
        found.append(score)
        parts = (score.bias, score.keep)
        return tuple(p if isinstance(p, Tensor) else torch.full((), 0 if p is None else p) for p in parts)

    with TransformGetItemToIndex():
        bias, keep = flex._vmap_for_bhqkv(tensors, prefix=(), out_dims=0)(*(torch.arange(n) for n in sizes))
    score = found[-1]
    return replace(score, bias=None if score.bias is None else bias, keep=None if score.keep is None else keep)


@contextmanager
def flex_attention_patched(attention: FlexAttention) -> Generator[None]:
    """flex_attention by the operator, whoever has imported it, also where gradients are asked for on the CPU."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(flex, "flex_attention_hop", attention))
        stack.enter_context(patch.object(flex, "_validate_device", lambda *_: None))
        stack.enter_context(patch.object(flex, "_warn_once", lambda *_, **__: None))
        yield
