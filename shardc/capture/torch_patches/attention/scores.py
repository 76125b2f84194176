"""Scores of attention that a model writes out: what each operator on them makes of `scale * q @ k^T + bias`.

    q @ k.mT                        Scores(q, k.mT)
    ... / 8                         Scores(q, k.mT, scale=1 / 8)
    ... .masked_fill(~mask, -inf)   Scores(q, k.mT, scale=1 / 8, keep=mask)

An operator that is not listed here makes a tensor of which nothing is known.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from shardc.capture.torch_patches.attention.notes import Expanded, Notes

ABSENT = -1e4
"""What models add to scores, or put in their place, so that they get no weight, is at most this."""


@dataclass(frozen=True)
class Scores:
    """`scale * q @ keys`, or `softcap * tanh(scale * q @ keys)`, plus `bias`, where `keep`; with `value` where `fill`.

    Shapes: q `[..., q_length, head_dim]`, keys `[..., head_dim, length]`; bias, keep and fill broadcast to `shape`.
    """

    q: Tensor
    keys: Tensor
    shape: tuple[int, ...]
    scale: float = 1.0
    softcap: float = 0.0
    bias: Tensor | None = None
    keep: Tensor | None = None
    fill: Tensor | None = None
    value: float = 0.0
    sinks: Tensor | None = None

    @property
    def masked(self) -> bool:
        return any(mask is not None for mask in (self.bias, self.keep, self.fill))


@dataclass(frozen=True)
class Number:
    """A tensor whose elements are all this number."""

    value: float


@dataclass(frozen=True)
class Largest:
    """The largest of each row of scores, with its dim."""

    scores: Scores


def noted(notes: Notes, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The note on the result of a function of torch called `name`, from those on its arguments; None for none."""
    rule = _RULES.get(name)
    if rule is None:
        return None
    try:
        _signature(rule).bind(notes, *args, **kwargs)
    except TypeError:  # an option that is not known here
        return None
    return rule(notes, *args, **kwargs)


@cache
def _signature(rule: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(rule)


def product(q: Any, keys: Any, scale: float = 1.0, bias: Tensor | None = None) -> Scores | None:
    """The note on a matrix product that may be one of queries and keys."""
    if not (isinstance(q, Tensor) and isinstance(keys, Tensor)) or min(q.ndim, keys.ndim) < 3 or q.ndim != keys.ndim:
        return None
    if not q.is_floating_point() or (bias is not None and bias.requires_grad):
        return None
    shape = (*torch.broadcast_shapes(q.shape[:-2], keys.shape[:-2]), q.shape[-2], keys.shape[-1])
    return Scores(q, keys, shape, scale, bias=bias)


def _number(notes: Notes, value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    note = notes.get(value, Number)
    return note.value if note is not None else None


def _fits(mask: Any, scores: Scores) -> bool:
    """Whether a mask broadcasts to the scores, and does not learn."""
    if not isinstance(mask, Tensor) or mask.requires_grad or mask.ndim > len(scores.shape) or scores.sinks is not None:
        return False
    return all(n == 1 or n == size for n, size in zip(mask.shape[::-1], scores.shape[::-1], strict=False))


def _scaled(notes: Notes, scores: Scores, factor: Any, apply: Callable[[Any, Any], Any]) -> Scores | None:
    """The scores after `apply`, a product or a quotient, with `factor`."""
    if scores.fill is not None or scores.sinks is not None:
        return None
    number = _number(notes, factor)
    if number is None:
        single = isinstance(factor, Tensor) and factor.ndim <= scores.q.ndim and factor.shape[-2:].numel() == 1
        if not single or scores.masked or scores.softcap:
            return None
        q = apply(scores.q, factor)
        return replace(scores, q=q) if q.shape == scores.q.shape and q.dtype == scores.q.dtype else None
    if number <= 0:
        return (
            None
            if scores.masked or scores.softcap or number == 0
            else replace(scores, scale=apply(scores.scale, number))
        )
    part = {"softcap": apply(scores.softcap, number)} if scores.softcap else {"scale": apply(scores.scale, number)}
    return replace(scores, **part, bias=None if scores.bias is None else apply(scores.bias, number))


def _mul(notes: Notes, input: Any, other: Any) -> Scores | None:
    for scores, operand in ((notes.get(input, Scores), other), (notes.get(other, Scores), input)):
        if scores is not None:
            return _scaled(notes, scores, operand, lambda a, b: a * b)
    return None


def _div(notes: Notes, input: Any, other: Any, *, rounding_mode: str | None = None) -> Scores | None:
    scores = notes.get(input, Scores)
    if scores is None or rounding_mode is not None:
        return None
    return _scaled(notes, scores, other, lambda a, b: a / b)


def _biased(scores: Scores, bias: Any, sign: int = 1) -> Scores | None:
    if not _fits(bias, scores) or not bias.is_floating_point() or scores.fill is not None:
        return None
    bias = bias if sign == 1 else -bias
    return replace(scores, bias=bias if scores.bias is None else scores.bias + bias)


def _add(notes: Notes, input: Any, other: Any, *, alpha: float = 1) -> Scores | None:
    for scores, operand in ((notes.get(input, Scores), other), (notes.get(other, Scores), input)):
        if scores is not None and alpha == 1:
            return _biased(scores, operand)
    return None


def _sub(notes: Notes, input: Any, other: Any, *, alpha: float = 1) -> Scores | None:
    scores, largest = notes.get(input, Scores), notes.get(other, Largest)
    if scores is None or alpha != 1:
        return None
    if largest is not None:  # a row's softmax does not change when a number is subtracted from all of it
        return scores if largest.scores is scores else None
    return _biased(scores, other, -1)


def _filled(notes: Notes, scores: Scores, where: Any, value: Any) -> Scores | None:
    number = _number(notes, value)
    if number is None or number > ABSENT or not _fits(where, scores) or where.dtype != torch.bool:
        return None
    if number == -math.inf:
        keep = where.logical_not()
        return replace(scores, keep=keep if scores.keep is None else scores.keep & keep)
    if scores.fill is not None:
        return replace(scores, fill=scores.fill | where) if number == scores.value else None
    return replace(scores, fill=where, value=number)


def _masked_fill(notes: Notes, input: Any, mask: Any, value: Any) -> Scores | None:
    scores = notes.get(input, Scores)
    return None if scores is None else _filled(notes, scores, mask, value)


def _where(notes: Notes, condition: Any, input: Any = None, other: Any = None) -> Scores | None:
    first, second = notes.get(input, Scores), notes.get(other, Scores)
    if first is not None and second is None and isinstance(condition, Tensor) and condition.dtype == torch.bool:
        return _filled(notes, first, condition.logical_not(), other)
    if second is not None and first is None:
        return _filled(notes, second, condition, input)
    return None


def _tanh(notes: Notes, input: Any) -> Scores | None:
    scores = notes.get(input, Scores)
    if scores is None or scores.masked or scores.softcap or scores.sinks is not None:
        return None
    return replace(scores, softcap=1.0)


def _same(notes: Notes, input: Any, *_: Any, **__: Any) -> Any:
    return notes.get(input, Scores) or notes.get(input, Largest) or notes.get(input, Number)


def reshaped(scores: Scores, shape: tuple[int, ...]) -> Scores | None:
    """The scores after a view that leaves rows as they are, and divides or joins dims before them."""
    lead, before = shape[:-2], scores.shape[:-2]
    if scores.sinks is not None or not scores.q.shape[:-2] == scores.keys.shape[:-2] == before:
        return None
    if shape[-2:] != scores.shape[-2:] or not lead:
        return None

    def seen(x: Tensor) -> Tensor:
        return x.reshape(*(lead if x.shape[:-2] == before else ()), *x.shape[-2:])

    masks = {name: mask for name in ("bias", "keep", "fill") if (mask := getattr(scores, name)) is not None}
    if any(mask.shape[:-2] != before and mask.shape[:-2].numel() != 1 for mask in masks.values()):
        return None
    parts = {name: seen(x) for name, x in (*masks.items(), ("q", scores.q), ("keys", scores.keys))}
    return replace(scores, **parts, shape=shape)


def _joined(notes: Notes, tensors: Any, dim: int = 0) -> Scores | None:
    """Scores with a column of sinks at the end: one number a head."""
    if len(tensors) != 2:
        return None
    scores, column = notes.get(tensors[0], Scores), tensors[1]
    if scores is None or scores.sinks is not None or dim not in (-1, len(scores.shape) - 1):
        return None
    expanded = notes.get(column, Expanded)
    source = column if expanded is None else expanded.source
    heads = scores.shape[-3]
    single = column.shape == (*scores.shape[:-1], 1) and source.ndim >= 3
    if not single or source.shape[-3] != heads or source.numel() != heads:
        return None
    return replace(scores, sinks=source.reshape(heads))


def _largest(notes: Notes, input: Any, dim: Any = None, keepdim: bool = False) -> Largest | None:
    scores = notes.get(input, Scores)
    last = dim in (-1, [-1], (-1,)) or (isinstance(dim, int) and scores is not None and dim == len(scores.shape) - 1)
    return Largest(scores) if scores is not None and last and keepdim else None


def _full(notes: Notes, size: Any, fill_value: Any, **_: Any) -> Number | None:
    return _tensor(notes, fill_value)


def _tensor(notes: Notes, data: Any, **_: Any) -> Number | None:
    return Number(float(data)) if isinstance(data, (int, float)) and not isinstance(data, bool) else None


def _new_full(notes: Notes, input: Tensor, size: Any, fill_value: Any, **_: Any) -> Number | None:
    return _tensor(notes, fill_value)


def _full_like(notes: Notes, input: Tensor, fill_value: Any, **_: Any) -> Number | None:
    return _tensor(notes, fill_value)


def _new_tensor(notes: Notes, input: Tensor, data: Any, **_: Any) -> Number | None:
    return _tensor(notes, data)


_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"), _mul),
    **dict.fromkeys(("div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__"), _div),
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), _add),
    **dict.fromkeys(("sub", "sub_", "__sub__", "__isub__"), _sub),
    **dict.fromkeys(("masked_fill", "masked_fill_"), _masked_fill),
    "where": _where,
    **dict.fromkeys(("tanh", "tanh_"), _tanh),
    **dict.fromkeys(("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone"), _same),
    "detach": lambda notes, input: notes.get(input, Largest),
    **dict.fromkeys(("cat", "concat", "concatenate"), _joined),
    **dict.fromkeys(("max", "amax"), _largest),
    **dict.fromkeys(("tensor", "as_tensor", "scalar_tensor"), _tensor),
    "full": _full,
    "new_full": _new_full,
    "full_like": _full_like,
    "new_tensor": _new_tensor,
}
