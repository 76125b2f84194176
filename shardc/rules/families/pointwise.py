"""Elementwise operators: every dim is a factor, and dims of size one broadcast. Tables list their linear groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._ops import OpOverload

from shardc.ir.precision import GRADIENT_CAST
from shardc.rules.notation import Rule, Workspace, adds, family, named_dims, parse

aten = torch.ops.aten

TOGETHER = (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.complex.default)
"""Linear in both tensor operands at once: P + P -> P. P + B and P + scalar are not."""

EACH = (aten.mul.Tensor,)
"""Linear in each operand alone: P * B -> P."""

BACKWARD = (
    aten.threshold_backward.default, aten.gelu_backward.default, aten.tanh_backward.default,
    aten.sigmoid_backward.default,
    aten.silu_backward.default, aten.native_dropout_backward.default, aten.hardswish_backward.default,
    aten.hardsigmoid_backward.default, aten.hardtanh_backward.default, aten.leaky_relu_backward.default,
    aten.elu_backward.default, aten.softplus_backward.default, aten.mish_backward.default, aten.logit_backward.default,
    aten.log_sigmoid_backward.default,
)  # fmt: skip
"""Linear in the gradient, which comes first."""

MOVES = (aten.clone.default, aten.positive.default, aten.alias.default, torch.ops.shardc.constrain.default)
"""Operators that return their operand unchanged, so that it may be partial with any dtype."""

_FIRST = (
    *BACKWARD, aten.div.Tensor, aten.neg.default, aten.mul.Scalar, aten.div.Scalar, aten.zeros_like.default,
)  # fmt: skip
GROUPS: Mapping[OpOverload, tuple[set[int], ...]] = {
    **{operator: ({0},) for operator in _FIRST},
    aten.where.self: ({1, 2},),
    aten.masked_fill.Tensor: ({0, 2},),
    aten.copy.default: ({1},),
    aten.fill.Tensor: ({1},),
    aten.polar.default: ({0},),
    aten.lerp.Scalar: ({0, 1},),
    aten.lerp.Tensor: ({0, 1},),
    aten.addcmul.default: ({0, 1}, {0, 2}),
    aten.addcdiv.default: ({0, 1},),
}
"""The linear groups of the other operators."""

FAILING = (
    aten.floor_divide.default, aten.remainder.Tensor, aten.fmod.Tensor, aten.div.Tensor_mode, aten.pow.Tensor_Tensor,
    aten.remainder.Scalar_Tensor, aten.pow.Scalar,
)  # fmt: skip
"""With integers, these raise if padding holds a zero or a negative number."""

UNTAGGED = (
    aten.native_dropout_backward.default, aten.copy.default, aten.fill.Scalar, aten.fill.Tensor,
    aten.zeros_like.default,
    aten.ones_like.default, aten.full_like.default, aten.empty_like.default, aten._to_copy.default, aten.clone.default,
    aten.floor_divide.default, aten.rsub.Tensor, aten.rsub.Scalar, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
    aten.hardswish.default, aten.complex.default, aten.polar.default, GRADIENT_CAST, *BACKWARD, *MOVES,
)  # fmt: skip
"""Elementwise operators, some of which torch does not tag as pointwise."""


def tensors(arguments: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among the arguments of a call, in order, lists flattened."""
    result: list[torch.Tensor] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            result.append(argument)
        elif isinstance(argument, (list, tuple)):
            result += tensors(argument)
    return result


def pointwise(operator: OpOverload, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Rule:
    """The rule of one elementwise call."""
    operands = tensors((*arguments, *keywords.values()))
    shape = torch.broadcast_shapes(*(x.shape for x in operands))
    names = [f"d{i}" if size != 1 else "1" for i, size in enumerate(shape)]

    def dims(x: torch.Tensor) -> str:
        return named_dims(x, names[len(names) - x.dim() :])

    results = [" ".join(names)] * len(operator._schema.returns)
    return parse(
        f"{', '.join(dims(x) for x in operands)} -> {', '.join(results)}",
        _groups(operator, arguments, keywords, operands),
        even=operator in FAILING and not any(x.is_floating_point() for x in operands),
        workspace=_between(operator, names, operands),
    )


def _between(operator: OpOverload, names: list[str], operands: list[torch.Tensor]) -> list[Workspace]:
    """What a call makes on its way: on the CPU, the gradient of dropout is the product of two products."""
    if operator is not aten.native_dropout_backward.default or operands[0].device.type == "cuda":
        return []
    return [Workspace(tuple(name for name in names if name != "1"), operands[0].element_size())]


def _groups(
    operator: OpOverload, arguments: tuple[Any, ...], keywords: Mapping[str, Any], operands: list[torch.Tensor]
) -> list[set[int]]:
    if operator in (*MOVES, GRADIENT_CAST):  # of the cast, the user has said what becomes of addends
        return [{0}]
    if operator is aten._to_copy.default:
        # the sum of cast addends is the cast sum only between floats, and a narrowing cast would round each addend
        source, target = operands[0].dtype, keywords.get("dtype") or operands[0].dtype
        widens = source.is_floating_point and target.is_floating_point and target.itemsize > source.itemsize
        return [{0}] if source == target or widens else []
    if operator in TOGETHER:
        groups = [{0, 1}] if len(operands) == 2 else []
    elif operator in EACH:
        groups = [{i} for i in range(len(operands))]
    elif operator is aten.masked_fill.Scalar:
        groups = [{0}] if arguments[2] == 0 else []
    else:
        groups = list(GROUPS.get(operator, ()))
    same = len({x.dtype for x in operands}) == 1 and all(isinstance(a, torch.Tensor) for a in arguments)
    # booleans sum to their disjunction, which is lost in operators that count them as numbers
    return [g for g in groups if all(adds(operands[i]) for i in g) or (same and operator in (*EACH, aten.where.self))]


@family(lambda operator: torch.Tag.pointwise in operator.tags or operator in UNTAGGED)
def _maker(operator: OpOverload) -> Any:
    return lambda *args, **kwargs: pointwise(operator, args, kwargs)
