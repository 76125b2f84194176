"""Layer and group norms as whole operators: batch dims pass, normalised dims stay whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardc.rules.notation import Rule, letters, parse, rule

aten = torch.ops.aten


def _layer(x: torch.Tensor, normalized: Sequence[int]) -> tuple[str, str, str]:
    """Rule text of the batch dims, of the normalised dims, and of ones in their place."""
    names = letters(x)
    cut = len(names) - len(normalized)
    inner = " ".join(f"{n}!" if n != "1" else n for n in names[cut:])
    return " ".join(names[:cut]), inner, " ".join("1" for _ in normalized)


@rule(aten.native_layer_norm.default)
def layer_norm(
    x: torch.Tensor, normalized: Sequence[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> Rule:
    del eps
    batch, inner, ones = _layer(x, normalized)
    affine = f", {inner}" * sum(t is not None for t in (weight, bias))
    return parse(f"{batch} {inner}{affine} -> {batch} {inner}, {batch} {ones}, {batch} {ones}")


@rule(aten._fused_rms_norm.default)
def rms_norm(x: torch.Tensor, normalized: Sequence[int], weight: torch.Tensor | None, eps: float | None) -> Rule:
    del eps
    batch, inner, ones = _layer(x, normalized)
    return parse(f"{batch} {inner}{f', {inner}' if weight is not None else ''} -> {batch} {inner}, {batch} {ones}")


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
    return parse(text, [{0}])
