"""Operators that keep their shape and work along one dim: softmax, running sums, sorting."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shardc.rules.families.reduction import along, row_statistics, stats_size
from shardc.rules.notation import ONLY, Body, Rule, Send, Variant, Workspace, adds, letters, mark, parse, rule
from shardc.runtime.collectives.all_gather import all_gather
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.runtime.kernels import exponentials, scans
from shardc.runtime.kernels.widening import LOW

aten = torch.ops.aten


def _softmax(reduced: Body, gathered: Body) -> Callable[..., Rule]:
    def maker(x: torch.Tensor, dim: int, widens: object = False, *_: object) -> Rule:
        names, rest = along(x, dim)
        text, made = " ".join(names), stats_size(x) if widens is True else x.element_size()
        return parse(f"{text} -> {text}", variants=row_statistics(reduced, gathered, "s", rest, x, made))

    return maker


rule(aten._softmax.default)(_softmax(exponentials.softmax, exponentials.softmax_gathered))
rule(aten._log_softmax.default)(_softmax(exponentials.log_softmax, exponentials.log_softmax_gathered))


@rule(aten._safe_softmax.default)
def safe_softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> Rule:
    maker = _softmax(exponentials.safe_softmax, exponentials.safe_softmax_gathered)
    return maker(x if dtype is None else x.to(dtype), dim)


def _softmax_backward(body: Body) -> Callable[..., Rule]:
    def maker(grad: torch.Tensor, output: torch.Tensor, dim: int, *_: object) -> Rule:
        names, rest = along(grad, dim)
        sent, text = Send(all_reduce, rest, stats_size(grad)), " ".join(names)
        # in wide numbers: the operands, and what becomes the result
        copies = (Workspace(("s", *rest), stats_size(grad), 3),) if stats_size(grad) > grad.element_size() else ()
        variants = [Variant(ONLY, body, {"s": [sent]}, workspace=copies)]
        return parse(f"{text}, {text} -> {text}", [{0}], variants=variants)

    return maker


rule(aten._softmax_backward_data.default)(_softmax_backward(exponentials.softmax_backward))
rule(aten._log_softmax_backward_data.default)(_softmax_backward(exponentials.log_softmax_backward))


def _scan(body: Body, linear: bool = False) -> Callable[..., Rule]:
    def maker(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Rule:
        names, rest = along(x, dim)
        result_dtype = dtype or (x.dtype if x.is_floating_point() or x.is_complex() else torch.int64)
        sent, text = Send(all_gather, rest, 4 if result_dtype in LOW else result_dtype.itemsize), " ".join(names)
        return parse(f"{text} -> {text}", [{0}] if linear and adds(x) else [], body=body, sends={"s": [sent]})

    return maker


rule(aten.cumsum.default)(_scan(scans.cumsum, linear=True))
rule(aten.cumprod.default)(_scan(scans.cumprod))
rule(aten.logcumsumexp.default)(_scan(scans.logcumsumexp))


def _running_extreme(body: Body) -> Callable[..., Rule]:
    def maker(x: torch.Tensor, dim: int) -> Rule:
        names, rest = along(x, dim)
        sent = [Send(all_gather, rest, size) for size in (x.element_size(), torch.int64.itemsize)]
        text = " ".join(names)
        return parse(f"{text} -> {text}, {text}", body=body, sends={"s": sent})

    return maker


rule(aten.cummax.default)(_running_extreme(scans.cummax))
rule(aten.cummin.default)(_running_extreme(scans.cummin))


@rule(aten.sort.default, aten.sort.stable)
def sort(x: torch.Tensor, dim: int = -1, descending: bool = False, *, stable: bool | None = None) -> Rule:
    """`dim` stays whole."""
    del descending, stable
    names = mark(letters(x), [dim])
    return parse(f"{names} -> {names}, {names}")
