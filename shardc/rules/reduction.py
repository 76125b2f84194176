"""Reductions, and operators that need one dim whole: softmax, sort, cumsum, ..."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardc.rules.notation import Body, Rule, Send, adds, letters, mark, parse, rule
from shardc.runtime import exponentials

aten = torch.ops.aten


def _reduce(reduction: str) -> Callable[..., Rule]:
    def maker(x: torch.Tensor, dim: Any = None, keepdim: bool = False, **_: object) -> Rule:
        names = letters(x)
        dims: list[int] = [dim] if isinstance(dim, int) else list(dim or ())
        chosen = {d % x.dim() for d in dims} if dims and x.dim() else set(range(x.dim()))
        left = " ".join(
            f"{n}:{reduction}" if i in chosen and n != "1" and reduction != "sum" else n for i, n in enumerate(names)
        )
        right = [("1" if i in chosen else n) for i, n in enumerate(names) if keepdim or i not in chosen]
        return parse(f"{left} -> {' '.join(right)}", [{0}] if reduction == "sum" and adds(x) else [])

    return maker


rule(aten.sum.dim_IntList, aten.sum.default)(_reduce("sum"))
rule(aten.amax.default)(_reduce("max"))
rule(aten.amin.default)(_reduce("min"))
rule(aten.prod.dim_int)(_reduce("prod"))


def _whole_reduction(x: torch.Tensor, dim: Any = None, keepdim: bool = False, **_: object) -> Rule:
    """A reduction whose parts do not combine elementwise: its dims stay whole."""
    names = letters(x)
    chosen = set(range(x.dim())) if dim is None else {dim % x.dim()} if x.dim() else set[int]()
    right = [("1" if i in chosen else n) for i, n in enumerate(names) if keepdim or i not in chosen]
    return parse(f"{mark(names, chosen)} -> {' '.join(right)}")


@rule(aten.logsumexp.default)
def logsumexp(x: torch.Tensor, dim: Sequence[int], keepdim: bool = False) -> Rule:
    names, chosen = letters(x), {d % x.dim() for d in dim}
    right = [("1" if i in chosen else n) for i, n in enumerate(names) if keepdim or i not in chosen]
    return parse(f"{mark(names, chosen)} -> {' '.join(right)}")


rule(aten.argmax.default, aten.argmin.default, aten.any.dim, aten.all.dim, aten.any.default, aten.all.default)(
    _whole_reduction
)


@rule(aten.max.dim, aten.min.dim)
def extreme(x: torch.Tensor, dim: int, keepdim: bool = False) -> Rule:
    names = letters(x)
    right = " ".join("1" if i == dim % x.dim() else n for i, n in enumerate(names) if keepdim or i != dim % x.dim())
    return parse(f"{mark(names, [dim])} -> {right}, {right}")


def _softmax(body: Body | None) -> Callable[..., Rule]:
    def maker(x: torch.Tensor, dim: int, *_: object) -> Rule:
        names, rest = _parted(x, dim)
        stats = Send("all_reduce", rest, max(x.element_size(), 4))
        return parse(f"{names} -> {names}", body=body, sends={"s": [stats, stats]})

    return maker


rule(aten._softmax.default)(_softmax(exponentials.softmax))
rule(aten._log_softmax.default)(_softmax(exponentials.log_softmax))


def _parted(x: torch.Tensor, dim: int) -> tuple[str, tuple[str, ...]]:
    """Rule text of a tensor whose `dim` is the parted factor s, and the other factors."""
    names = letters(x)
    if names:
        names[dim] = "s~" if x.shape[dim] != 1 else "1"
    return " ".join(names), tuple(name for name in names if name not in ("s~", "1"))


@rule(aten._safe_softmax.default)
def safe_softmax(x: torch.Tensor, dim: int, *_: object) -> Rule:
    names = mark(letters(x), [dim])
    return parse(f"{names} -> {names}")


@rule(aten.cumsum.default)
def cumsum(x: torch.Tensor, dim: int, **_: object) -> Rule:
    names = mark(letters(x), [dim])
    return parse(f"{names} -> {names}", [{0}] if adds(x) else [])


@rule(aten.cumprod.default, aten.logcumsumexp.default)
def scan(x: torch.Tensor, dim: int, **_: object) -> Rule:
    names = mark(letters(x), [dim])
    return parse(f"{names} -> {names}")


@rule(aten.cummax.default, aten.cummin.default)
def running_extreme(x: torch.Tensor, dim: int) -> Rule:
    names = mark(letters(x), [dim])
    return parse(f"{names} -> {names}, {names}")


@rule(aten.histc.default)
def histc(x: torch.Tensor, bins: int = 100, *_: object) -> Rule:
    """Without given bounds the bins depend on the extremes of all elements."""
    return parse(f"{mark(letters(x), range(x.dim()))} -> {'o!' if bins != 1 else '1'}")


def _softmax_backward(body: Body) -> Callable[..., Rule]:
    def maker(grad: torch.Tensor, output: torch.Tensor, dim: int, *_: object) -> Rule:
        names, rest = _parted(grad, dim)
        sent = Send("all_reduce", rest, max(grad.element_size(), 4))
        return parse(f"{names}, {names} -> {names}", [{0}], body=body, sends={"s": [sent]})

    return maker


rule(aten._softmax_backward_data.default)(_softmax_backward(exponentials.softmax_backward))
rule(aten._log_softmax_backward_data.default)(_softmax_backward(exponentials.log_softmax_backward))


@rule(aten.sort.default, aten.sort.stable)
def sort(x: torch.Tensor, dim: int = -1, descending: bool = False, *, stable: bool | None = None) -> Rule:
    del descending, stable
    names = mark(letters(x), [dim])
    return parse(f"{names} -> {names}, {names}")


@rule(aten.topk.default)
def topk(x: torch.Tensor, k: int, dim: int = -1, *_: object) -> Rule:
    names = letters(x)
    names[dim] = "s"
    left = mark(names, [dim])
    names[dim] = "k" if k != 1 else "1"
    right = mark(names, [dim])
    return parse(f"{left} -> {right}, {right}")
