"""What the elements of a tensor are, where that follows from how a graph makes it of nothing but positions.

    %i = arange(8);  %c = view(%i, [8, 1])           Line: the row
    %m = le(%i, %c)                                  Cond: column - row <= 0
    %f = where(%m, 0, -inf)                          Choice: 0 where that holds, else -inf
    %b = bitwise_and(%m, view(%padding, [2, 1, 8]))  Cond: column - row <= 0, and %padding

No value is computed, so no tensor of the size of a mask exists. Dims are counted from the end: rows are dim -2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from shardc.capture.torch_patches.written_attention import FILL
from shardc.ir.program import value_of

aten: Any = torch.ops.aten
INFINITY = math.inf


@dataclass(frozen=True)
class Line:
    """The number `const + slopes[dim] * position along dim + ...`; size 1 along dims without a slope, or alike there."""

    const: float
    slopes: Mapping[int, float] = field(default_factory=dict[int, float])


@dataclass(frozen=True)
class Distance:
    """The absolute value of a line."""

    line: Line


@dataclass(frozen=True)
class Spread:
    """The elements of a tensor that is viewed as `shape` and broadcasts."""

    node: fx.Node
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class Cond:
    """True where `low <= column - row <= high` and all of `rest` are true; or, `negated`, where not."""

    low: float = -INFINITY
    high: float = INFINITY
    rest: tuple[Spread, ...] = ()
    negated: bool = False


@dataclass(frozen=True)
class Choice:
    """`inside` where a condition holds, else `outside`."""

    condition: Cond
    inside: float
    outside: float


def _is_everywhere(condition: Cond) -> bool:
    return (condition.low, condition.high) == (-INFINITY, INFINITY)


@dataclass(frozen=True)
class Biased:
    """A choice, with a tensor added to it."""

    choice: Choice
    bias: Spread


Known = Line | Distance | Spread | Cond | Choice | Biased
NOT = Cond(negated=True)


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
        if not isinstance(condition, Cond) or _is_everywhere(condition) or node.target in _MOVES:
            return known
        before, after = (tuple(value_of(n).shape) for n in (operand, node))
        ones = [_is_one(size) for size in ((1, 1, *before)[-2:])]
        if not any(one and not _is_one(size) for one, size in zip(ones, (1, 1, *after)[-2:], strict=True)):
            return known
        return Spread(operand, before) if known is condition else None


def condition_of(node: Any, known: Any) -> Cond | None:
    """What is known of a boolean operand: at least itself."""
    if isinstance(known, Cond):
        return known
    if isinstance(known, Spread) and value_of(known.node).dtype == torch.bool:
        return Cond(rest=(known,))
    if isinstance(known, Line) and not known.slopes:
        return Cond() if known.const else NOT
    if isinstance(node, fx.Node) and value_of(node).dtype == torch.bool:
        return Cond(rest=(Spread(node, tuple(value_of(node).shape)),))
    return None


def _both(first: Cond | None, second: Cond | None) -> Cond | None:
    if first is None or second is None:
        return None
    if NOT in (first, second):
        return NOT
    if first.negated or second.negated:
        return first if second == Cond() else second if first == Cond() else None
    rest = (*first.rest, *(part for part in second.rest if part not in first.rest))
    return Cond(max(first.low, second.low), min(first.high, second.high), rest)


def _opposite(condition: Cond | None) -> Cond | None:
    """Where a condition does not hold; as a band, if that is one."""
    if condition is None:
        return None
    low, high, plain = condition.low, condition.high, not condition.rest
    if plain and not condition.negated and low == -INFINITY and high < INFINITY:
        return Cond(high + 1)
    if plain and not condition.negated and high == INFINITY and low > -INFINITY:
        return Cond(high=low - 1)
    return replace(condition, negated=not condition.negated)


def _and(node: fx.Node, x: Any, y: Any) -> Known | None:
    if value_of(node).dtype != torch.bool:
        return None
    return _both(condition_of(node.args[0], x), condition_of(node.args[1], y))


def _or(node: fx.Node, x: Any, y: Any) -> Known | None:
    if value_of(node).dtype != torch.bool:
        return None
    first, second = condition_of(node.args[0], x), condition_of(node.args[1], y)
    return _opposite(_both(_opposite(first), _opposite(second)))


def _not(node: fx.Node, x: Any) -> Known | None:
    return _opposite(x) if isinstance(x, Cond) else None


def _arange(node: fx.Node, *bounds: Any) -> Known | None:
    start, step = (bounds[0] if len(bounds) > 1 else 0), (bounds[2] if len(bounds) > 2 else 1)
    return _line(node, start, {-1: step}) if isinstance(start, (int, float)) else None


def _line(node: fx.Node, const: float, slopes: Mapping[int, float]) -> Line:
    """A line, without slopes along dims of size 1."""
    shape = value_of(node).shape
    return Line(const, {dim: slope for dim, slope in slopes.items() if slope and not _is_one(shape[dim])})


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _full(node: fx.Node, *args: Any) -> Known | None:
    target = str(node.target)
    value = 1 if "ones" in target else 0 if "zeros" in target else args[-1]
    if not isinstance(value, (int, float)):
        return None
    if value_of(node).dtype == torch.bool:
        return Cond() if value else NOT
    return Line(value)


def _viewed(node: fx.Node, x: Any, shape: Any) -> Known | None:
    """A view that only puts in, or takes out, dims of size 1."""
    before = tuple(value_of(node.args[0]).shape)
    places = _places(before, tuple(shape))
    if x is None or places is not None:
        return None if x is None or places is None else _placed(node, x, places)
    return _split(node, x, before, tuple(shape))


def _split(node: fx.Node, x: Known, before: tuple[Any, ...], after: tuple[Any, ...]) -> Known | None:
    """A view that divides or joins dims before rows, none of which a band sees, nor the rest of a condition."""
    first = next((dim for dim, sizes in enumerate(zip(before, after, strict=False)) if str(sizes[0]) != str(sizes[1])), 0)
    seen = [-1, -2, *range(-len(before), first - len(before))]
    if [str(size) for size in before[-2:]] != [str(size) for size in after[-2:]] or first > len(before) - 3:
        return None
    condition = x.condition if isinstance(x, Choice) else x
    if not isinstance(condition, Cond):
        return None
    for part in condition.rest:
        if not all(_is_one(n) or dim in seen for dim, n in zip(range(-len(part.shape), 0), part.shape, strict=True)):
            return None
    return _placed(node, x, {dim: dim if dim >= -2 else dim + len(before) - len(after) for dim in seen})


def _places(before: tuple[Any, ...], after: tuple[Any, ...]) -> dict[int, int] | None:
    """For dims that are not of size 1, where they go, counted from the end."""
    old = [dim for dim in range(-len(before), 0) if not _is_one(before[dim])]
    new = [dim for dim in range(-len(after), 0) if not _is_one(after[dim])]
    same = len(old) == len(new) and all(str(before[a]) == str(after[b]) for a, b in zip(old, new, strict=True))
    return dict(zip(old, new, strict=True)) if same else None


def _placed(node: fx.Node, x: Known, places: Mapping[int, int]) -> Known | None:
    rank = value_of(node).ndim
    if isinstance(x, Line):
        return Line(x.const, {places[dim]: slope for dim, slope in x.slopes.items()})
    if isinstance(x, Distance):
        return Distance(Line(x.line.const, {places[dim]: slope for dim, slope in x.line.slopes.items()}))
    if isinstance(x, Spread):
        sizes = [1] * rank
        for dim, place in places.items():
            if -dim <= len(x.shape):
                sizes[place] = x.shape[dim]
        return Spread(x.node, tuple(sizes))
    if isinstance(x, Biased):
        choice, bias = _placed(node, x.choice, places), _placed(node, x.bias, places)
        return Biased(choice, bias) if isinstance(choice, Choice) and isinstance(bias, Spread) else None
    if isinstance(x, Choice):
        condition = _placed(node, x.condition, places)
        return Choice(condition, x.inside, x.outside) if isinstance(condition, Cond) else None
    rest = [_placed(node, part, places) for part in x.rest]
    if _is_everywhere(x) or {-2: places.get(-2, -2), -1: places.get(-1, -1)} == {-2: -2, -1: -1}:
        moved = x.low, x.high
    elif places.get(-2, -1) == -1 and places.get(-1, -2) == -2:
        moved = -x.high, -x.low
    else:
        return None
    return Cond(*moved, tuple(part for part in rest if isinstance(part, Spread)), x.negated)


def _permuted(node: fx.Node, x: Any, order: Sequence[int]) -> Known | None:
    rank = len(order)
    return None if x is None else _placed(node, x, {dim - rank: place - rank for place, dim in enumerate(order)})


def _expanded(node: fx.Node, x: Any, shape: Any) -> Known | None:
    if x is not None:
        return x
    source = node.args[0]
    return Spread(source, tuple(value_of(source).shape)) if isinstance(source, fx.Node) else None


def _sliced(node: fx.Node, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Known | None:
    size, dim = value_of(node.args[0]).shape[dim], dim % value_of(node).ndim - value_of(node).ndim
    start = 0 if start is None else start
    if x is None or step != 1 or not isinstance(start, int) or not isinstance(size, int):
        return None
    start = max(0, start + size if start < 0 else start)
    if isinstance(x, Line):
        return _line(node, x.const + x.slopes.get(dim, 0) * start, x.slopes)
    if isinstance(x, Cond) and not x.rest and dim in (-1, -2):
        shift = start if dim == -1 else -start
        return replace(x, low=x.low - shift, high=x.high - shift)
    if isinstance(x, Choice) and (condition := _sliced(node, x.condition, dim, start, end)) is not None:
        return Choice(condition, x.inside, x.outside) if isinstance(condition, Cond) else None
    return None


def _cast(node: fx.Node, x: Any, *_: Any) -> Known | None:
    dtype = value_of(node).dtype
    if isinstance(x, Cond) and dtype != torch.bool:
        return Choice(x, 1, 0)
    if dtype == torch.bool and not isinstance(x, (Cond, Spread)):
        return _compare(node, x, 0, lambda a, b: a != b)
    if isinstance(x, Spread) and value_of(x.node).dtype != dtype:
        return None
    if isinstance(x, Choice) and dtype.is_floating_point:  # the lowest number of one type may be -inf in another
        numbers = torch.tensor([x.inside, x.outside], dtype=torch.float64).to(dtype).tolist()
        return Choice(x.condition, numbers[0], numbers[1])
    return x


def _number(x: Any) -> float | None:
    if isinstance(x, (int, float)):
        return float(x) if isinstance(x, bool) else x
    return x.const if isinstance(x, Line) and not x.slopes else None


def _elementwise(apply: Callable[[float, float], float]) -> Callable[..., Known | None]:
    """Sums and products of lines and numbers; of choices and numbers, anything."""
    kind = apply(5, 3)

    def rule(node: fx.Node, x: Any, y: Any, *rest: Any) -> Known | None:
        if rest or node.kwargs.get("alpha", 1) != 1:
            return None
        if isinstance(x, Cond) and isinstance(y, Cond) and kind == 15:
            return _both(x, y)
        if isinstance(x, Cond):
            x = Choice(x, 1, 0)
        a, b = _number(x), _number(y)
        if isinstance(x, Choice) and b is not None:
            return _choice(x, lambda value: apply(value, b))
        if isinstance(y, Choice) and a is not None:
            return _choice(y, lambda value: apply(a, value))
        if a is not None and b is not None:
            return Line(apply(a, b))
        if kind == 8 and (isinstance(x, Choice) or isinstance(y, Choice)):
            return _biased(node, x, y, node.args[1]) if isinstance(x, Choice) else _biased(node, y, x, node.args[0])
        first, second = (Line(n) if (n := _number(v)) is not None else v for v in (x, y))
        if not isinstance(first, Line) or not isinstance(second, Line):
            return None
        if kind in (8, 2, -2):
            dims = {*first.slopes, *second.slopes}
            slopes = {dim: apply(first.slopes.get(dim, 0), second.slopes.get(dim, 0)) for dim in dims}
            return _line(node, apply(first.const, second.const), slopes)
        factor, line = (first.const, second) if not first.slopes else (second.const, first)
        plain = kind == 15 and not (first.slopes and second.slopes)
        return _line(node, line.const * factor, {d: s * factor for d, s in line.slopes.items()}) if plain else None

    return rule


def _biased(node: fx.Node, choice: Any, bias: Any, operand: Any) -> Biased | None:
    """A choice with an operand added, of which `bias` is known."""
    if bias is None and isinstance(operand, fx.Node):
        bias = Spread(operand, tuple(value_of(operand).shape))
    floating = value_of(node).is_floating_point()
    if not floating or not isinstance(bias, Spread) or value_of(bias.node).dtype != value_of(node).dtype:
        return None
    return Biased(choice, bias)


def _choice(x: Choice, apply: Callable[[float], float]) -> Choice | None:
    inside, outside = apply(x.inside), apply(x.outside)
    return None if math.isnan(inside) or math.isnan(outside) else Choice(x.condition, inside, outside)


def _floor_divided(node: fx.Node, x: Any, y: Any, *_: Any) -> Known | None:
    """Zero, if all positions are below the divisor."""
    rounding = node.kwargs.get("rounding_mode", "floor" if "floor" in str(node.target) else None)
    number = _number(y)
    if number is None or number <= 0 or rounding is None or not isinstance(x, Line):
        return None
    low, high = _bounds(node, x)
    return Line(0) if low >= 0 and high < number else None


def _bounds(node: fx.Node, line: Line) -> tuple[float, float]:
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
    number = _number(y)
    if isinstance(x, Choice) and number is not None:
        inside, outside = compare(x.inside, number), compare(x.outside, number)
        if inside == outside:
            return Cond() if inside else NOT
        return x.condition if inside else _opposite(x.condition)
    if isinstance(x, Distance) and number is not None and not compare(0, number):
        return _opposite(condition_of(None, _compare(node, x, y, lambda a, b: not compare(a, b))))
    if isinstance(x, Distance) and number is not None:
        within, beyond = _compare(node, x.line, number, compare), _compare(node, x.line, -number, _mirrored(compare))
        if number >= 0 and isinstance(within, Cond) and isinstance(beyond, Cond):
            return _both(within, beyond)
        return None
    difference = _elementwise(lambda a, b: a - b)(node, x, y)
    if not isinstance(difference, Line):
        return None
    low, high = _bounds(node, difference)
    signs = [sign for sign, met in ((-1, low < 0), (0, low <= 0 <= high), (1, high > 0)) if met]
    outcomes = {compare(sign, 0) for sign in signs}
    if len(outcomes) == 1:
        return Cond() if outcomes.pop() else NOT
    return _band(node, difference, compare)


def _mirrored(compare: Callable[[float, float], bool]) -> Callable[[float, float], bool]:
    return lambda a, b: compare(-a, -b)


def _band(node: fx.Node, line: Line, compare: Callable[[float, float], bool]) -> Cond | None:
    """Where a line of column - row compares so with 0."""
    shape, slopes = value_of(node).shape, dict(line.slopes)
    single = len(shape) < 2 or _is_one(shape[-2])
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
    if not isinstance(diagonal, int) or value_of(node).ndim < 2:
        return None
    if isinstance(x, Cond):
        return _both(x, part)
    if isinstance(x, Choice) and x.outside == 0:
        both = _both(x.condition, part)
        return None if both is None else Choice(both, x.inside, 0)
    number = _number(x)
    return None if number is None else Choice(part, number, 0)


def _where(node: fx.Node, condition: Any, x: Any, y: Any) -> Known | None:
    chosen = condition_of(node.args[0], condition)
    if chosen is None:
        return None
    if isinstance(x, Cond) and isinstance(y, (Cond, Line)) and value_of(node).dtype == torch.bool:
        other = condition_of(None, y)
        return _both(chosen, x) if other == NOT else None
    a, b = _number(x), _number(y)
    if a is not None and b is not None:
        return Choice(chosen, a, b)
    if isinstance(x, Choice) and b == x.outside:
        both = _both(chosen, x.condition)
        return None if both is None else Choice(both, x.inside, x.outside)
    return _biased(node, Choice(chosen, 0.0, b), x, node.args[1]) if b == -INFINITY else None


def _masked_fill(node: fx.Node, x: Any, mask: Any, value: Any) -> Known | None:
    condition, number = condition_of(node.args[1], mask), _number(value)
    if condition is None or number is None:
        return None
    if isinstance(x, Cond) and value_of(node).dtype == torch.bool:
        return _both(x, _opposite(condition)) if not number else None
    if isinstance(x, Choice) and number == x.outside:
        both = _both(_opposite(condition), x.condition)
        return None if both is None else Choice(both, x.inside, x.outside)
    inside = _number(x)
    opposite = _opposite(condition)
    return Choice(opposite, inside, number) if inside is not None and opposite is not None else None


def _indexed(node: fx.Node, x: Any, *_: Any) -> Known | None:
    """Elements of a tensor whose elements are all alike."""
    return x if (isinstance(x, Line) and not x.slopes) or x in (Cond(), NOT) else None


def _absolute(node: fx.Node, x: Any) -> Known | None:
    return Distance(x) if isinstance(x, Line) else None


_MOVES = {aten.view.default, aten.permute.default, aten.slice.Tensor, aten.index.Tensor}
_RULES: dict[Any, Callable[..., Known | None]] = {
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
        ),  # fmt: skip
        _full,
    ),
    aten.view.default: _viewed,
    aten.permute.default: _permuted,
    aten.expand.default: _expanded,
    aten.slice.Tensor: _sliced,
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
    aten.index.Tensor: _indexed,
    FILL: lambda node, where, value, *_: _where(node, where, value, 0.0),
}
