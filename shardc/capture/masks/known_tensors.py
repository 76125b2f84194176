"""What the elements of a tensor are, where that follows from how a graph makes it of nothing but positions.

    %i = arange(8);  %c = view(%i, [8, 1])           Ramp: the row
    %m = le(%i, %c)                                  Cond: column - row <= 0
    %f = where(%m, 0, -inf)                          Choice: 0 where that holds, else -inf
    %b = bitwise_and(%m, view(%padding, [2, 1, 8]))  Cond: column - row <= 0, and %padding

No value is computed, so no tensor of the size of a mask exists. Dims are counted from the end: rows are dim -2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from shardc.capture.masks.known_values import (
    INFINITY,
    NOT,
    Biased,
    Broadcast,
    Choice,
    Cond,
    Distance,
    Known,
    Ramp,
    aten,
    both_of,
    condition_of,
    is_everywhere,
    is_one,
    line_of,
    number_of,
    opposite_of,
)
from shardc.capture.masks.known_views import MOVES, SPREADS
from shardc.capture.torch_patches.attention.written import FILL
from shardc.ir.program import value_of


class KnownTensors:
    """What is known of the values of a graph, found when asked for."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, Known | None] = {}

    def of(self, node: fx.Node) -> Known | None:
        """What is known of a value, or None."""
        pending = [node]
        while pending:
            last = pending[-1]
            missing = [operand for operand in last.all_input_nodes if operand not in self._known]
            if last in self._known or not missing or last.target not in _RULES:
                self._known.setdefault(pending.pop(), self._found(last))
            else:
                pending += missing
        return self._known[node]

    def _found(self, node: fx.Node) -> Known | None:
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        if rule is None or not isinstance(value_of(node), torch.Tensor):
            return None
        operands = [self._operand(arg, node) if isinstance(arg, fx.Node) else arg for arg in node.args]
        return rule(node, *operands)

    def _operand(self, operand: fx.Node, node: fx.Node) -> Known | None:
        """What is known of an operand as a call sees it: where rows or columns are broadcast, a band is none there."""
        known = self._known.get(operand)
        choice = known.choice if isinstance(known, Biased) else known
        condition = choice.condition if isinstance(choice, Choice) else known
        if not isinstance(condition, Cond) or is_everywhere(condition) or node.target in MOVES:
            return known
        before, after = (tuple(value_of(n).shape) for n in (operand, node))
        ones = [is_one(size) for size in ((1, 1, *before)[-2:])]
        if not any(one and not is_one(size) for one, size in zip(ones, (1, 1, *after)[-2:], strict=True)):
            return known
        return Broadcast(operand, before) if known is condition else None


def _and(node: fx.Node, x: Any, y: Any) -> Known | None:
    if value_of(node).dtype != torch.bool:
        return None
    return both_of(condition_of(node.args[0], x), condition_of(node.args[1], y))


def _or(node: fx.Node, x: Any, y: Any) -> Known | None:
    if value_of(node).dtype != torch.bool:
        return None
    first, second = condition_of(node.args[0], x), condition_of(node.args[1], y)
    return opposite_of(both_of(opposite_of(first), opposite_of(second)))


def _not(node: fx.Node, x: Any) -> Known | None:
    return opposite_of(x) if isinstance(x, Cond) else None


def _arange(node: fx.Node, *bounds: Any) -> Known | None:
    start, step = (bounds[0] if len(bounds) > 1 else 0), (bounds[2] if len(bounds) > 2 else 1)
    return line_of(node, start, {-1: step}) if isinstance(start, (int, float)) else None


def _full(node: fx.Node, *args: Any) -> Known | None:
    target = str(node.target)
    value = 1 if "ones" in target else 0 if "zeros" in target else args[-1]
    if not isinstance(value, (int, float)):
        return None
    if value_of(node).dtype == torch.bool:
        return Cond() if value else NOT
    return Ramp(value)


def _cast(node: fx.Node, x: Any, *_: Any) -> Known | None:
    dtype = value_of(node).dtype
    if isinstance(x, Cond) and dtype != torch.bool:
        return Choice(x, 1, 0)
    if dtype == torch.bool and not isinstance(x, (Cond, Broadcast)):
        return _compare(node, x, 0, lambda a, b: a != b)
    if isinstance(x, Broadcast) and value_of(x.node).dtype != dtype:
        return None
    if isinstance(x, Choice) and dtype.is_floating_point:  # the lowest number of one type may be -inf in another
        numbers = torch.tensor([x.inside, x.outside], dtype=torch.float64).to(dtype).tolist()
        return Choice(x.condition, numbers[0], numbers[1])
    return x


def _elementwise(apply: Callable[[float, float], float]) -> Callable[..., Known | None]:
    """Sums and products of lines and numbers; of choices and numbers, anything."""
    kind = apply(5, 3)

    def rule(node: fx.Node, x: Any, y: Any, *rest: Any) -> Known | None:
        if rest or node.kwargs.get("alpha", 1) != 1:
            return None
        if isinstance(x, Cond) and isinstance(y, Cond) and kind == 15:
            return both_of(x, y)
        if isinstance(x, Cond):
            x = Choice(x, 1, 0)
        a, b = number_of(x), number_of(y)
        if isinstance(x, Choice) and b is not None:
            return _choice(x, lambda value: apply(value, b))
        if isinstance(y, Choice) and a is not None:
            return _choice(y, lambda value: apply(a, value))
        if a is not None and b is not None:
            return Ramp(apply(a, b))
        if kind == 8 and (isinstance(x, Choice) or isinstance(y, Choice)):
            return _biased(node, x, y, node.args[1]) if isinstance(x, Choice) else _biased(node, y, x, node.args[0])
        first, second = (Ramp(n) if (n := number_of(v)) is not None else v for v in (x, y))
        if not isinstance(first, Ramp) or not isinstance(second, Ramp):
            return None
        if kind in (8, 2, -2):
            dims = {*first.slopes, *second.slopes}
            slopes = {dim: apply(first.slopes.get(dim, 0), second.slopes.get(dim, 0)) for dim in dims}
            return line_of(node, apply(first.const, second.const), slopes)
        factor, line = (first.const, second) if not first.slopes else (second.const, first)
        plain = kind == 15 and not (first.slopes and second.slopes)
        return line_of(node, line.const * factor, {d: s * factor for d, s in line.slopes.items()}) if plain else None

    return rule


def _biased(node: fx.Node, choice: Any, bias: Any, operand: Any) -> Biased | None:
    """A choice with an operand added, of which `bias` is known."""
    if bias is None and isinstance(operand, fx.Node):
        bias = Broadcast(operand, tuple(value_of(operand).shape))
    floating = value_of(node).is_floating_point()
    if not floating or not isinstance(bias, Broadcast) or value_of(bias.node).dtype != value_of(node).dtype:
        return None
    return Biased(choice, bias)


def _choice(x: Choice, apply: Callable[[float], float]) -> Choice | None:
    inside, outside = apply(x.inside), apply(x.outside)
    return None if math.isnan(inside) or math.isnan(outside) else Choice(x.condition, inside, outside)


def _floor_divided(node: fx.Node, x: Any, y: Any, *_: Any) -> Known | None:
    """Zero, if all positions are below the divisor."""
    rounding = node.kwargs.get("rounding_mode", "floor" if "floor" in str(node.target) else None)
    number = number_of(y)
    if number is None or number <= 0 or rounding is None or not isinstance(x, Ramp):
        return None
    low, high = _bounds(node, x)
    return Ramp(0) if low >= 0 and high < number else None


def _bounds(node: fx.Node, line: Ramp) -> tuple[float, float]:
    low = high = line.const
    for dim, slope in line.slopes.items():
        size = value_of(node).shape[dim]
        end = slope * (size - 1 if isinstance(size, int) else INFINITY)
        low, high = low + min(0, end), high + max(0, end)
    return low, high


def _comparison(compare: Callable[[float, float], bool]) -> Callable[..., Known | None]:
    return lambda node, x, y: _compare(node, x, y, compare)


def _compare(node: fx.Node, x: Any, y: Any, compare: Callable[[float, float], bool]) -> Known | None:
    if isinstance(x, Cond):
        x = Choice(x, 1, 0)
    number = number_of(y)
    if isinstance(x, Choice) and number is not None:
        inside, outside = compare(x.inside, number), compare(x.outside, number)
        if inside == outside:
            return Cond() if inside else NOT
        return x.condition if inside else opposite_of(x.condition)
    if isinstance(x, Distance) and number is not None and not compare(0, number):
        return opposite_of(condition_of(None, _compare(node, x, y, lambda a, b: not compare(a, b))))
    if isinstance(x, Distance) and number is not None:
        within, beyond = _compare(node, x.line, number, compare), _compare(node, x.line, -number, _mirrored(compare))
        if number >= 0 and isinstance(within, Cond) and isinstance(beyond, Cond):
            return both_of(within, beyond)
        return None
    difference = _elementwise(lambda a, b: a - b)(node, x, y)
    if not isinstance(difference, Ramp):
        return None
    low, high = _bounds(node, difference)
    signs = [sign for sign, met in ((-1, low < 0), (0, low <= 0 <= high), (1, high > 0)) if met]
    outcomes = {compare(sign, 0) for sign in signs}
    if len(outcomes) == 1:
        return Cond() if outcomes.pop() else NOT
    return _band(node, difference, compare)


def _mirrored(compare: Callable[[float, float], bool]) -> Callable[[float, float], bool]:
    return lambda a, b: compare(-a, -b)


def _band(node: fx.Node, line: Ramp, compare: Callable[[float, float], bool]) -> Cond | None:
    """Where a line of column - row compares so with 0."""
    shape, slopes = value_of(node).shape, dict(line.slopes)
    single = len(shape) < 2 or is_one(shape[-2])
    slope = slopes.pop(-1, 0)
    row = slopes.pop(-2, -slope if single else 0)
    if slopes or not slope or row != -slope or int(slope) != slope or int(line.const) != line.const:
        return None
    below, at, above = compare(-1, 0), compare(0, 0), compare(1, 0)
    if slope < 0:
        below, above = above, below
    edge = -line.const / slope  # of column - row
    if below and not above:
        return Cond(high=math.floor(edge) if at or edge % 1 else edge - 1)
    if above and not below:
        return Cond(low=math.ceil(edge) if at or edge % 1 else edge + 1)
    if at and not below and edge % 1 == 0:
        return Cond(edge, edge)
    return None


def _triangle(node: fx.Node, x: Any, diagonal: int = 0) -> Known | None:
    upper = "triu" in str(node.target)
    part = Cond(low=diagonal) if upper else Cond(high=diagonal)
    if value_of(node).ndim < 2:
        return None
    if value_of(node).dtype == torch.bool:
        return both_of(condition_of(node.args[0], x), part)
    if isinstance(x, Choice) and x.outside == 0:
        both = both_of(x.condition, part)
        return None if both is None else Choice(both, x.inside, 0)
    number = number_of(x)
    return None if number is None else Choice(part, number, 0)


def _where(node: fx.Node, condition: Any, x: Any, y: Any) -> Known | None:
    chosen = condition_of(node.args[0], condition)
    if chosen is None:
        return None
    if isinstance(x, Cond) and isinstance(y, (Cond, Ramp)) and value_of(node).dtype == torch.bool:
        other = condition_of(None, y)
        return both_of(chosen, x) if other == NOT else None
    a, b = number_of(x), number_of(y)
    if a is not None and b is not None:
        return Choice(chosen, a, b)
    if isinstance(x, Choice) and b == x.outside:
        both = both_of(chosen, x.condition)
        return None if both is None else Choice(both, x.inside, x.outside)
    return _biased(node, Choice(chosen, 0.0, b), x, node.args[1]) if b is not None and b == -INFINITY else None


def _masked_fill(node: fx.Node, x: Any, mask: Any, value: Any) -> Known | None:
    condition, number = condition_of(node.args[1], mask), number_of(value)
    if condition is None or number is None:
        return None
    if isinstance(x, Cond) and value_of(node).dtype == torch.bool:
        return both_of(x, opposite_of(condition)) if not number else None
    if isinstance(x, Choice) and number == x.outside:
        both = both_of(opposite_of(condition), x.condition)
        return None if both is None else Choice(both, x.inside, x.outside)
    inside = number_of(x)
    opposite = opposite_of(condition)
    return Choice(opposite, inside, number) if inside is not None and opposite is not None else None


def _absolute(node: fx.Node, x: Any) -> Known | None:
    return Distance(x) if isinstance(x, Ramp) else None


_RULES: dict[Any, Callable[..., Known | None]] = {
    **MOVES,
    **SPREADS,
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _arange),
    **dict.fromkeys(
        (
            aten.full.default,
            aten.ones.default,
            aten.zeros.default,
            aten.full_like.default,
            aten.ones_like.default,
            aten.zeros_like.default,
            aten.new_ones.default,
            aten.new_zeros.default,
            aten.new_full.default,
            aten.scalar_tensor.default,
        ),
        _full,
    ),
    **dict.fromkeys((aten._to_copy.default, aten.clone.default), _cast),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _elementwise(lambda a, b: a + b)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _elementwise(lambda a, b: a - b)),
    **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), _elementwise(lambda a, b: b - a)),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _elementwise(lambda a, b: a * b)),
    aten.neg.default: lambda node, x: _elementwise(lambda a, b: a * b)(node, x, -1),
    aten.abs.default: _absolute,
    **dict.fromkeys((aten.floor_divide.default, aten.div.Tensor_mode), _floor_divided),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _comparison(lambda a, b: a >= b)),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _comparison(lambda a, b: a > b)),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), _comparison(lambda a, b: a <= b)),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), _comparison(lambda a, b: a < b)),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar), _comparison(lambda a, b: a == b)),
    **dict.fromkeys((aten.ne.Tensor, aten.ne.Scalar), _comparison(lambda a, b: a != b)),
    **dict.fromkeys((aten.bitwise_and.Tensor, aten.logical_and.default), _and),
    **dict.fromkeys((aten.bitwise_or.Tensor, aten.logical_or.default), _or),
    **dict.fromkeys((aten.bitwise_not.default, aten.logical_not.default), _not),
    **dict.fromkeys((aten.tril.default, aten.triu.default), _triangle),
    **dict.fromkeys((aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar), _where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    FILL: lambda node, where, value, *_: _where(node, where, value, 0.0),
}
