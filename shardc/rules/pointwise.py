"""Elementwise operators: every dim is a factor, dims of size one broadcast. Which partial operands pass is the table below."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._ops import OpOverload

from shardc.rules.notation import Rule, family, parse

aten = torch.ops.aten

TOGETHER = (aten.add.Tensor, aten.sub.Tensor)
"""Linear in all tensor operands at once: P + P -> P; P + B and P + scalar are no sums of parts."""

EACH = (aten.mul.Tensor,)
"""Linear in each operand alone: P * B -> P."""

FIRST = (
    aten.div.Tensor, aten.neg.default, aten.clone.default, aten.mul.Scalar, aten.div.Scalar, aten.threshold_backward.default,
    aten.gelu_backward.default, aten.tanh_backward.default, aten.sigmoid_backward.default, aten.silu_backward.default,
    aten.native_dropout_backward.default, aten.positive.default, torch.ops.shardc.constrain.default,
)  # fmt: skip
"""Linear in the first operand, the others whole."""

UNTAGGED = (
    aten.native_dropout_backward.default, aten.copy.default, aten.fill.Scalar, aten.zeros_like.default, aten.ones_like.default,
    aten.full_like.default, aten.empty_like.default, aten._to_copy.default, aten.clone.default, torch.ops.shardc.constrain.default,
)  # fmt: skip
"""Elementwise operators that torch does not tag as pointwise."""


def tensors(arguments: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += tensors(argument)
    return found


def pointwise(operator: OpOverload, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Rule:
    """The rule of one elementwise call."""
    operands = tensors((*arguments, *keywords.values()))
    shape = torch.broadcast_shapes(*(x.shape for x in operands))
    names = [f"d{i}" if size != 1 else "1" for i, size in enumerate(shape)]

    def dims(x: torch.Tensor) -> str:
        own = names[len(names) - x.dim() :]
        return " ".join("1" if size == 1 else name for size, name in zip(x.shape, own, strict=True))

    return parse(f"{', '.join(dims(x) for x in operands)} -> {' '.join(names)}", _linear(operator, arguments, len(operands)))


def _linear(operator: OpOverload, arguments: tuple[Any, ...], operands: int) -> list[set[int]]:
    if operator in TOGETHER:
        return [set(range(operands))] if all(isinstance(a, torch.Tensor) for a in arguments[:2]) else []
    if operator in EACH:
        return [{i} for i in range(operands)]
    if operator is aten.where.self:
        return [{1, 2}]
    if operator is aten._to_copy.default:
        # a cast of parts is a part of the cast only between floats; summing rounded parts is what reductions do anyway
        return [{0}] if isinstance(arguments[0], torch.Tensor) and arguments[0].is_floating_point() else []
    return [{0}] if operator in FIRST else []


@family(lambda operator: torch.Tag.pointwise in operator.tags or operator in UNTAGGED)
def _maker(operator: OpOverload) -> Any:
    return lambda *args, **kwargs: pointwise(operator, args, kwargs)
