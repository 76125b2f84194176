"""Identities: calls that a lowered program does without, one row each.

    Identity(aten.mul.Tensor, lambda x, y: x if y == 1 and not _complex(x) else None, "exact for every float")

`becomes` gets the arguments of a call. It returns the node that the call's readers may read instead, `Shorter` for the
same operator on other arguments, or None. It need not ask whether dtype, shape and layout stay the same, nor whether
anybody may write to the result: the pass `simplify` asks that of every row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from shardc.ir.facts import dtype_of

aten = torch.ops.aten


class Shorter(NamedTuple):
    """The arguments of the same operator that make the same value of what its operand was made of."""

    args: tuple[Any, ...]


class Identity(NamedTuple):
    """What a call of `operator` becomes, and why its bits are the same. Where the operator makes a new tensor, this
    lies in memory as its operand does, or is `contiguous` whatever the operand."""

    operator: Any
    becomes: Callable[..., fx.Node | Shorter | None]
    reason: str
    contiguous: bool = False


def _from(x: fx.Node, operator: Any) -> tuple[Any, ...]:
    """The arguments of the call that makes a value; none where it is a call of another operator."""
    return x.args if x.target is operator else ()


def _complex(x: fx.Node) -> bool:
    return dtype_of(x).is_complex


def _nothing(x: fx.Node, number: Any, alpha: Any, sign: float) -> bool:
    """Whether no bit changes where a zero is added that has this sign: -0.0 + 0.0 is 0.0, and -0.0 + -0.0 is -0.0."""
    if not isinstance(number, (int, float)) or number != 0 or alpha != 1 or _complex(x):
        return False
    return not dtype_of(x).is_floating_point or math.copysign(1.0, number) == sign


def _like_operand(memory_format: Any) -> bool:
    return memory_format in (None, torch.preserve_format)


IDENTITIES: tuple[Identity, ...] = (
    Identity(aten.view.default, lambda x, _: x, "a view of the same shape"),
    Identity(aten.view.default, lambda x, s: Shorter((y[0], s)) if (y := _from(x, aten.view.default)) else None,
             "a view of a view; of a view that goes back to the shape before it, nothing is left"),
    Identity(aten.view.default, lambda x, s: Shorter((y[0], s)) if (y := _from(x, aten.unsqueeze.default)) else None,
             "a dim of one element that a view adds or drops"),
    Identity(aten.permute.default, lambda x, p: x if list(p) == sorted(p) else None, "the order that dims have"),
    Identity(aten.permute.default,
             lambda x, p: Shorter((y[0], [y[1][dim] for dim in p])) if (y := _from(x, aten.permute.default)) else None,
             "a permutation of a permutation; of a transposition and its inverse, nothing is left"),
    Identity(aten.expand.default, lambda x, *_: x, "an expansion to the same shape"),
    Identity(aten.slice.Tensor, lambda x, *_: x, "all of a dim: what starts later or takes steps is shorter"),
    Identity(aten.slice_backward.default, lambda x, *_: x, "all of a dim, as its gradient", contiguous=True),
    Identity(aten.cat.default, lambda xs, *_: xs[0] if len(xs) == 1 else None, "one operand", contiguous=True),
    Identity(aten.constant_pad_nd.default, lambda x, n, *_: x if not any(n) else None, "no padding", contiguous=True),
    Identity(aten.clone.default, lambda x, memory_format=None: x if _like_operand(memory_format) else None,
             "a copy has the values of what it copies"),
    Identity(aten.clone.default, lambda x, memory_format=None: x if memory_format == torch.contiguous_format else None,
             "so has one that is contiguous", contiguous=True),
    Identity(aten._to_copy.default, lambda x, memory_format=None, **_: x if _like_operand(memory_format) else None,
             "a cast to the dtype that it has"),
    Identity(aten.mul.Tensor, lambda x, y: x if y == 1 and not _complex(x) else None,
             "exact for every number, infinities and NaN among them; but inf * (1 + 0j) has a NaN"),
    Identity(aten.div.Tensor, lambda x, y: x if y == 1 and not _complex(x) else None, "exact as well"),
    Identity(aten.pow.Tensor_Scalar, lambda x, y: x if y == 1 else None, "torch copies"),
    Identity(aten.add.Tensor, lambda x, y, alpha=1: x if _nothing(x, y, alpha, -1.0) else None,
             "-0.0 is added, or any zero to integers"),
    Identity(aten.sub.Tensor, lambda x, y, alpha=1: x if _nothing(x, y, alpha, 1.0) else None,
             "0.0 is subtracted, or any zero from integers"),
    Identity(aten.neg.default, lambda x: (_from(x, aten.neg.default) or (None,))[0], "signs flip twice"),
    Identity(aten.where.self, lambda _, x, y: x if x is y else None, "the same either way", contiguous=True),
)  # fmt: skip


def _by_operator() -> Mapping[Any, tuple[Identity, ...]]:
    table: dict[Any, tuple[Identity, ...]] = {}
    for row in IDENTITIES:
        table[row.operator] = (*table.get(row.operator, ()), row)
    return table


BY_OPERATOR: Mapping[Any, tuple[Identity, ...]] = _by_operator()
