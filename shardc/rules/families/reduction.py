"""Reductions. Results that combine elementwise are partial; for the others, a body exchanges data between the parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from shardc.rules.notation import Body, Rule, Send, Variant, Workspace, adds, letters, mark, parse, rule
from shardc.runtime.collectives.all_gather import all_gather
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.runtime.kernels import exponentials, extremes, lists

aten = torch.ops.aten


def _chosen(x: torch.Tensor, dim: Any) -> set[int]:
    """The reduced dims: all if `dim` names none."""
    dims: list[int] = [dim] if isinstance(dim, int) else list(dim or ())
    return {d % x.dim() for d in dims} if dims and x.dim() else set(range(x.dim()))


def _kept(names: list[str], chosen: set[int], keepdim: bool) -> list[str]:
    """Names of the result's dims."""
    return [("1" if i in chosen else n) for i, n in enumerate(names) if keepdim or i not in chosen]


def _reduce(reduction: str, truth: bool = False) -> Callable[..., Rule]:
    """A maker for a reduction. `truth` marks `any` and `all`, which are max and min of booleans.

    Of numbers, these split evenly only, because the infinity that would fill padding counts as true.
    """

    def maker(x: torch.Tensor, dim: Any = None, keepdim: bool = False, **_: object) -> Rule:
        names, chosen = letters(x), _chosen(x, dim)
        left = " ".join(
            f"{n}:{reduction}" if i in chosen and n != "1" and reduction != "sum" else n for i, n in enumerate(names)
        )
        right = " ".join(_kept(names, chosen, keepdim))
        even = truth and x.dtype is not torch.bool
        return parse(f"{left} -> {right}", [{0}] if reduction == "sum" and adds(x) else [], even=even)

    return maker


rule(aten.sum.dim_IntList, aten.sum.default)(_reduce("sum"))
rule(aten.amax.default)(_reduce("max"))
rule(aten.amin.default)(_reduce("min"))
rule(aten.prod.dim_int)(_reduce("prod"))
rule(aten.any.dim, aten.any.dims, aten.any.default)(_reduce("max", truth=True))
rule(aten.all.dim, aten.all.dims, aten.all.default)(_reduce("min", truth=True))


def parted(x: torch.Tensor, dims: set[int]) -> tuple[str, tuple[str, ...]]:
    """Rule text of a tensor with parted `dims`, and the names of its other factors."""
    names = letters(x)
    return mark(names, dims, "~"), tuple(n for i, n in enumerate(names) if i not in dims and n != "1")


def stats_size(x: torch.Tensor) -> int:
    """Bytes of an element that a body sends if it computes with float16 and bfloat16 in float32."""
    return max(x.element_size(), 4) if x.is_floating_point() else torch.get_default_dtype().itemsize


def row_statistics(
    reduced: Body, gathered: Body, parted: Iterable[str], rest: tuple[str, ...], x: torch.Tensor, kept: int = 0
) -> list[Variant]:
    """The two variants of an operator that needs each row's maximum and sum of exponentials.

    `reduced` all-reduces one after the other. `gathered` all-gathers both at once. Each makes the exponentials, before
    a result of `kept` bytes an element, and a copy of `x` in wide numbers.
    """
    names, size = [*parted], stats_size(x)
    one, both = Send(all_reduce, rest, size), Send(all_gather, rest, size, elements=2)
    needed = size * (2 if size > x.element_size() else 1) - kept
    work = (Workspace((*names, *rest), 1, needed),) if needed > 0 else ()
    return [
        Variant("all_reduce", reduced, dict.fromkeys(names, (one, one)), workspace=work),
        Variant("all_gather", gathered, dict.fromkeys(names, (both,)), workspace=work),
    ]


@rule(aten.logsumexp.default)
def logsumexp(x: torch.Tensor, dim: Sequence[int], keepdim: bool = False) -> Rule:
    chosen = {d % max(x.dim(), 1) for d in dim}
    right = " ".join(_kept(letters(x), chosen, keepdim))
    if x.is_complex():
        return parse(f"{mark(letters(x), chosen)} -> {right}")
    left, rest = parted(x, chosen)
    variants = row_statistics(
        exponentials.logsumexp, exponentials.logsumexp_gathered, [f"d{i}" for i in chosen], rest, x
    )
    return parse(f"{left} -> {right}", variants=variants)


def _place(body: Body) -> Callable[..., Rule]:
    def maker(x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> Rule:
        chosen = _chosen(x, dim)
        left, rest = parted(x, chosen)
        sent = [Send(all_gather, rest, size) for size in (x.element_size(), torch.int64.itemsize)]
        right = " ".join(_kept(letters(x), chosen, keepdim))
        return parse(f"{left} -> {right}", body=body, sends={f"d{i}": sent for i in chosen})

    return maker


rule(aten.argmax.default)(_place(extremes.argmax))
rule(aten.argmin.default)(_place(extremes.argmin))


def along(x: torch.Tensor, dim: int) -> tuple[list[str], tuple[str, ...]]:
    """Names of a tensor's dims, where `dim` is the parted factor s, and the names of the other factors."""
    names = letters(x)
    if names:
        names[dim] = "s~" if x.shape[dim] != 1 else "1"
    return names, tuple(name for name in names if name not in ("s~", "1"))


def _extreme(body: Body) -> Callable[..., Rule]:
    def maker(x: torch.Tensor, dim: int, keepdim: bool = False) -> Rule:
        names, rest = along(x, dim)
        sent = [Send(all_gather, rest, size) for size in (x.element_size(), torch.int64.itemsize)]
        right = " ".join(_kept(names, _chosen(x, dim), keepdim))
        return parse(f"{' '.join(names)} -> {right}, {right}", body=body, sends={"s": sent})

    return maker


rule(aten.max.dim)(_extreme(extremes.max_along))
rule(aten.min.dim)(_extreme(extremes.min_along))


@rule(aten.median.dim, aten.nanmedian.dim, aten.mode.default)
def typical(x: torch.Tensor, dim: int = -1, keepdim: bool = False) -> Rule:
    """The kernel sorts `dim`, so it stays whole."""
    names, chosen = letters(x), _chosen(x, dim)
    right = " ".join(_kept(names, chosen, keepdim))
    return parse(f"{mark(names, chosen)} -> {right}, {right}")


@rule(aten.hash_tensor.default)
def hash_tensor(x: torch.Tensor, dim: Sequence[int] = (), *, keepdim: bool = False, mode: int = 0) -> Rule:
    """The exclusive or of the elements' bits; ranks gather 64-bit integers."""
    chosen = _chosen(x, dim)
    left, rest = parted(x, chosen if mode == 0 else set())
    right = " ".join(_kept(letters(x), chosen, keepdim))
    sent = [Send(all_gather, rest, torch.int64.itemsize)]
    return parse(f"{left} -> {right}", body=lists.hash_tensor, sends={f"d{i}": sent for i in chosen})


@rule(aten.topk.default)
def topk(x: torch.Tensor, k: int, dim: int = -1, *_: object) -> Rule:
    """The dim stays whole if a part's `k` candidates would be more than half of it."""
    names, rest = along(x, dim)
    after = [*names]
    if names:
        names[dim] = names[dim] if 2 * k <= x.shape[dim] else names[dim].replace("~", "!")
        after[dim] = "k!" if k != 1 else "1"
    sent = [Send(all_gather, rest, size, k) for size in (x.element_size(), torch.int64.itemsize)]
    right = " ".join(after)
    return parse(f"{' '.join(names)} -> {right}, {right}", body=extremes.topk, sends={"s": sent})


@rule(aten.histc.default)
def histc(x: torch.Tensor, bins: int = 100, low: float = 0, high: float = 0) -> Rule:
    """Counts add up. Without bounds, the bins depend on the extremes of all elements, so all dims stay whole."""
    names = " ".join(letters(x)) if low != high else mark(letters(x), range(x.dim()))
    return parse(f"{names} -> {'o!' if bins != 1 else '1'}", even=True)
