"""What may be known of the elements of a tensor, and how conditions combine.

Dims are counted from the end: rows are dim -2, columns dim -1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from shardc.ir.program import value_of

aten: Any = torch.ops.aten


INFINITY = math.inf


@dataclass(frozen=True)
class Ramp:
    """The number `const + slopes[dim] * position along dim + ...`; alike along dims without a slope."""

    const: float
    slopes: Mapping[int, float] = field(default_factory=dict[int, float])


@dataclass(frozen=True)
class Distance:
    """The absolute value of a line."""

    line: Ramp


@dataclass(frozen=True)
class Broadcast:
    """The elements of a tensor that is viewed as `shape` and broadcasts."""

    node: fx.Node
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class Cond:
    """True where `low <= column - row <= high` and all of `rest` are true; or, `negated`, where not."""

    low: float = -INFINITY
    high: float = INFINITY
    rest: tuple[Broadcast, ...] = ()
    negated: bool = False


@dataclass(frozen=True)
class Choice:
    """`inside` where a condition holds, else `outside`."""

    condition: Cond
    inside: float
    outside: float


@dataclass(frozen=True)
class Biased:
    """A choice, with a tensor added to it."""

    choice: Choice
    bias: Broadcast


def is_everywhere(condition: Cond) -> bool:
    return (condition.low, condition.high) == (-INFINITY, INFINITY)


Known = Ramp | Distance | Broadcast | Cond | Choice | Biased


NOT = Cond(negated=True)


def condition_of(node: Any, known: Any) -> Cond | None:
    """What is known of a boolean operand: at least itself."""
    if isinstance(known, Cond):
        return known
    if isinstance(known, Broadcast) and value_of(known.node).dtype == torch.bool:
        return Cond(rest=(known,))
    if isinstance(known, Ramp) and not known.slopes:
        return Cond() if known.const else NOT
    if isinstance(node, fx.Node) and value_of(node).dtype == torch.bool:
        return Cond(rest=(Broadcast(node, tuple(value_of(node).shape)),))
    return None


def both_of(first: Cond | None, second: Cond | None) -> Cond | None:
    if first is None or second is None:
        return None
    if NOT in (first, second):
        return NOT
    if first.negated or second.negated:
        return first if second == Cond() else second if first == Cond() else None
    rest = (*first.rest, *(part for part in second.rest if part not in first.rest))
    return Cond(max(first.low, second.low), min(first.high, second.high), rest)


def opposite_of(condition: Cond | None) -> Cond | None:
    """Where a condition does not hold; as a band, if that is one."""
    if condition is None:
        return None
    low, high, plain = condition.low, condition.high, not condition.rest
    if plain and not condition.negated and low == -INFINITY and high < INFINITY:
        return Cond(high + 1)
    if plain and not condition.negated and high == INFINITY and low > -INFINITY:
        return Cond(high=low - 1)
    return replace(condition, negated=not condition.negated)


def line_of(node: fx.Node, const: float, slopes: Mapping[int, float]) -> Ramp:
    """A line, without slopes along dims of size 1."""
    shape = value_of(node).shape
    return Ramp(const, {dim: slope for dim, slope in slopes.items() if slope and not is_one(shape[dim])})


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def number_of(x: Any) -> float | None:
    if isinstance(x, (int, float)):
        return float(x) if isinstance(x, bool) else x
    return x.const if isinstance(x, Ramp) and not x.slopes else None
