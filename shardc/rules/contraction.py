"""Matrix products: the contracted factor reduces, every product is linear in each side alone."""

from __future__ import annotations

import torch

from shardc.rules.notation import Rule, fixed, parse, rule

aten = torch.ops.aten

fixed(aten.mm.default, text="m k, k n -> m n", linear=[{0}, {1}], flops=["m k n"])
fixed(aten.bmm.default, text="b m k, b k n -> b m n", linear=[{0}, {1}], flops=["b m k n"])
fixed(aten.dot.default, text="k, k -> ", linear=[{0}, {1}], flops=["k"])
fixed(aten.mv.default, text="m k, k -> m", linear=[{0}, {1}], flops=["m k"])


@rule(aten.addmm.default)
def addmm(bias: torch.Tensor, *_: object, **__: object) -> Rule:
    return parse(f"{_bias(bias, 'mn')}, m k, k n -> m n", [{0, 1}, {0, 2}], flops=["m k n"])


@rule(aten.baddbmm.default)
def baddbmm(bias: torch.Tensor, *_: object, **__: object) -> Rule:
    return parse(f"{_bias(bias, 'bmn')}, b m k, b k n -> b m n", [{0, 1}, {0, 2}], flops=["b m k n"])


def _bias(bias: torch.Tensor, names: str) -> str:
    own = names[len(names) - bias.dim() :]
    return " ".join("1" if size == 1 else name for size, name in zip(bias.shape, own, strict=True))
