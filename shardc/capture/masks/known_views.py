"""What is known of views, slices and copies along new dims, from what is known of the tensor that they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from shardc.capture.masks.known_values import (
    NOT,
    Biased,
    Broadcast,
    Choice,
    Cond,
    Distance,
    Known,
    Ramp,
    aten,
    is_everywhere,
    is_one,
    line_of,
)  # fmt: skip
from shardc.ir.program import value_of


def _viewed(node: fx.Node, x: Any, shape: Any) -> Known | None:
    """A view that only puts in, or takes out, dims of size 1."""
    before = tuple(value_of(node.all_input_nodes[0]).shape)
    places = _places(before, tuple(shape))
    if x is None or places is not None:
        return None if x is None or places is None else _placed(node, x, places)
    return _split(node, x, before, tuple(shape))


def _split(node: fx.Node, x: Known, before: tuple[Any, ...], after: tuple[Any, ...]) -> Known | None:
    """A view that divides or joins dims before rows, none of which a band sees, nor the rest of a condition."""
    first = next(
        (dim for dim, sizes in enumerate(zip(before, after, strict=False)) if str(sizes[0]) != str(sizes[1])), 0
    )
    seen = [-1, -2, *range(-len(before), first - len(before))]
    if [str(size) for size in before[-2:]] != [str(size) for size in after[-2:]] or first > len(before) - 3:
        return None
    condition = x.condition if isinstance(x, Choice) else Cond(rest=(x,)) if isinstance(x, Broadcast) else x
    if not isinstance(condition, Cond):
        return None
    for part in condition.rest:
        if not all(is_one(n) or dim in seen for dim, n in zip(range(-len(part.shape), 0), part.shape, strict=True)):
            return None
    return _placed(node, x, {dim: dim if dim >= -2 else dim + len(before) - len(after) for dim in seen})


def _places(before: tuple[Any, ...], after: tuple[Any, ...]) -> dict[int, int] | None:
    """For dims that are not of size 1, where they go, counted from the end."""
    old = [dim for dim in range(-len(before), 0) if not is_one(before[dim])]
    new = [dim for dim in range(-len(after), 0) if not is_one(after[dim])]
    same = len(old) == len(new) and all(str(before[a]) == str(after[b]) for a, b in zip(old, new, strict=True))
    return dict(zip(old, new, strict=True)) if same else None


def _placed(node: fx.Node, x: Known, places: Mapping[int, int]) -> Known | None:
    rank = value_of(node).ndim
    if isinstance(x, Ramp):
        return Ramp(x.const, {places[dim]: slope for dim, slope in x.slopes.items()})
    if isinstance(x, Distance):
        return Distance(Ramp(x.line.const, {places[dim]: slope for dim, slope in x.line.slopes.items()}))
    if isinstance(x, Broadcast):
        sizes = [1] * rank
        for dim, place in places.items():
            if -dim <= len(x.shape):
                sizes[place] = x.shape[dim]
        return Broadcast(x.node, tuple(sizes))
    if isinstance(x, Biased):
        choice, bias = _placed(node, x.choice, places), _placed(node, x.bias, places)
        return Biased(choice, bias) if isinstance(choice, Choice) and isinstance(bias, Broadcast) else None
    if isinstance(x, Choice):
        condition = _placed(node, x.condition, places)
        return Choice(condition, x.inside, x.outside) if isinstance(condition, Cond) else None
    rest = [_placed(node, part, places) for part in x.rest]
    if is_everywhere(x) or {-2: places.get(-2, -2), -1: places.get(-1, -1)} == {-2: -2, -1: -1}:
        moved = x.low, x.high
    elif places.get(-2, -1) == -1 and places.get(-1, -2) == -2:
        moved = -x.high, -x.low
    else:
        return None
    return Cond(*moved, tuple(part for part in rest if isinstance(part, Broadcast)), x.negated)


def _permuted(node: fx.Node, x: Any, order: Sequence[int]) -> Known | None:
    rank = len(order)
    return None if x is None else _placed(node, x, {dim - rank: place - rank for place, dim in enumerate(order)})


def _expanded(node: fx.Node, x: Any, shape: Any) -> Known | None:
    if x is not None:
        return x
    source = node.args[0]
    return Broadcast(source, tuple(value_of(source).shape)) if isinstance(source, fx.Node) else None


def _sliced(node: fx.Node, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Known | None:
    size, dim = value_of(node.all_input_nodes[0]).shape[dim], dim % value_of(node).ndim - value_of(node).ndim
    start = 0 if start is None else start
    if x is None or step != 1 or not isinstance(start, int) or not isinstance(size, int):
        return None
    start = max(0, start + size if start < 0 else start)
    if isinstance(x, Ramp):
        return line_of(node, x.const + x.slopes.get(dim, 0) * start, x.slopes)
    if isinstance(x, Cond) and not x.rest and dim in (-1, -2):
        shift = start if dim == -1 else -start
        return replace(x, low=x.low - shift, high=x.high - shift)
    if isinstance(x, Choice) and (condition := _sliced(node, x.condition, dim, start, end)) is not None:
        return Choice(condition, x.inside, x.outside) if isinstance(condition, Cond) else None
    return None


def _indexed(node: fx.Node, x: Any, *_: Any) -> Known | None:
    """Elements of a tensor whose elements are all alike."""
    return x if (isinstance(x, Ramp) and not x.slopes) or x in (Cond(), NOT) else None


MOVES: dict[Any, Callable[..., Known | None]] = {
    aten.view.default: _viewed,
    aten.permute.default: _permuted,
    aten.slice.Tensor: _sliced,
    aten.index.Tensor: _indexed,
}
"""Operators whose result has other dims than their operand."""

SPREADS: dict[Any, Callable[..., Known | None]] = {aten.expand.default: _expanded}
