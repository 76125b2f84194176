"""Layer and RMS norms as whole operators. Batch dims split freely; over split normalised dims, ranks reduce sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardc.rules.families.reduction import stats_size
from shardc.rules.notation import Rule, Send, letters, mark, parse, rule
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.runtime.kernels import norms

aten = torch.ops.aten


def _layer(x: torch.Tensor, normalized: Sequence[int]) -> tuple[str, str, str]:
    """Rule texts of the batch dims, of the normalised dims, and of dims of size one in their place."""
    names = letters(x)
    cut = len(names) - len(normalized)
    inner = names[cut:]
    return " ".join(names[:cut]), mark(inner, range(len(inner)), "~"), " ".join("1" for _ in normalized)


def _sends(x: torch.Tensor, normalized: Sequence[int], count: int, together: int = 1) -> dict[str, list[Send]]:
    """`count` all-reduces over every normalised dim, of `together` numbers a row."""
    names = letters(x)
    cut = len(names) - len(normalized)
    rest = tuple(n for n in names[:cut] if n != "1")
    return {n: [Send(all_reduce, rest, stats_size(x), together)] * count for n in names[cut:]}


@rule(aten.native_layer_norm.default)
def layer_norm(
    x: torch.Tensor, normalized: Sequence[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> Rule:
    del eps
    batch, inner, ones = _layer(x, normalized)
    affine = f", {inner}" * sum(t is not None for t in (weight, bias))
    text = f"{batch} {inner}{affine} -> {batch} {inner}, {batch} {ones}, {batch} {ones}"
    return parse(text, body=norms.layer_norm, sends=_sends(x, normalized, 2))


@rule(aten._fused_rms_norm.default)
def rms_norm(x: torch.Tensor, normalized: Sequence[int], weight: torch.Tensor | None, eps: float | None) -> Rule:
    del eps
    batch, inner, ones = _layer(x, normalized)
    affine = f", {inner}" if weight is not None else ""
    text = f"{batch} {inner}{affine} -> {batch} {inner}, {batch} {ones}"
    return parse(text, body=norms.rms_norm, sends=_sends(x, normalized, 1))


@rule(aten.native_layer_norm_backward.default)
def layer_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, normalized: Sequence[int], mean: torch.Tensor, inverse: torch.Tensor,
    weight: torch.Tensor | None, bias: torch.Tensor | None, mask: Sequence[bool],
) -> Rule:  # fmt: skip
    """Linear in the gradient; the gradients of weight and bias sum over the batch dims."""
    del grad, mean, inverse
    batch, inner, ones = _layer(x, normalized)
    affine = f", {inner}" * sum(t is not None for t in (weight, bias))
    results = [f"{batch} {inner}" if mask[0] else "_", inner if mask[1] else "_", inner if mask[2] else "_"]
    text = f"{batch} {inner}, {batch} {inner}, {batch} {ones}, {batch} {ones}{affine} -> {', '.join(results)}"
    return parse(text, [{0}], body=norms.layer_norm_backward, sends=_sends(x, normalized, int(mask[0]), together=2))
