"""Values of a traced graph as expressions, which another trace of the same model computes from what it finds there."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shardc.capture.experts.events import TensorPlace

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class TakenTensor:
    """A tensor of the trace."""

    place: TensorPlace


@dataclass(frozen=True)
class Call:
    """A call of an operator on expressions."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


Expression = TakenTensor | Call
VIEWS = frozenset({
    aten.view.default, aten.permute.default, aten.select.int, aten.slice.Tensor, aten.expand.default,
    aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem,
})  # fmt: skip
_MORE = frozenset({
    aten._to_copy.default, aten.clone.default, aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor, aten.stack.default,
    aten.cat.default, aten.sum.dim_IntList, aten.ge.Tensor, aten.cumsum.default, aten.arange.default,
})  # fmt: skip


class ExpressionWriter:
    """Writes nodes as expressions. `places`: where values can be had in a trace."""

    def __init__(self, places: Mapping[fx.Node, TensorPlace]) -> None:
        self._places = places
        self.read = set[fx.Node]()
        """Nodes that stand in expressions as calls."""

    def __call__(self, node: fx.Node) -> Expression:
        """Raises LookupError where a trace has no such value."""
        if node in self._places:
            return TakenTensor(self._places[node])
        if node.op != "call_function" or (node.target not in VIEWS and node.target not in _MORE):
            raise LookupError(node.name)
        self.read.add(node)
        args, kwargs = fx.map_arg((tuple(node.args), dict(node.kwargs)), self)  # type: ignore[arg-type]
        return Call(node.target, _plain(args), tuple((key, _plain(value)) for key, value in kwargs.items()))


def places_in(value: Any) -> Iterator[TensorPlace]:
    """What expressions take from a trace."""
    if isinstance(value, TakenTensor):
        yield value.place
    for one in value if isinstance(value, tuple) else value.args if isinstance(value, Call) else ():
        yield from places_in(one)


def _plain(value: Any) -> Any:
    return tuple(_plain(one) for one in value) if isinstance(value, (list, tuple)) else value


def evaluate(expression: Any, taken: Callable[[TensorPlace], Tensor], known: dict[Any, Any]) -> Any:
    """The value of an expression; `known` are those that were computed already."""
    if isinstance(expression, TakenTensor):
        return taken(expression.place)
    if isinstance(expression, tuple):
        return [evaluate(one, taken, known) for one in expression]
    if not isinstance(expression, Call):
        return expression
    if expression not in known:
        args = [evaluate(one, taken, known) for one in expression.args]
        kwargs = {key: evaluate(value, taken, known) for key, value in expression.kwargs}
        known[expression] = expression.target(*args, **kwargs)
    return known[expression]


def turned(expression: Expression) -> Expression:
    """The transpose of a matrix."""
    if isinstance(expression, Call) and expression.target is aten.permute.default:
        inner, order = expression.args
        return inner if order == (1, 0) else expression
    return Call(aten.permute.default, (expression, (1, 0)))


def stacked(expressions: list[Expression]) -> Expression:
    """The expressions side by side, in a new first dim: as they lie in a tensor, if they are all that it holds."""
    return _lifted(expressions) or Call(aten.stack.default, (tuple(expressions), 0))


def _lifted(expressions: list[Expression]) -> Expression | None:
    """The one value of which these are the first, second, ..., seen through the same views."""
    first = expressions[0]
    if not all(isinstance(one, Call) and one.target is first.target for one in expressions):  # type: ignore[union-attr]
        return None
    calls: list[Call] = expressions  # type: ignore[assignment]
    head = calls[0]
    sources = [one.args[0] for one in calls]
    same = all(one.args[1:] == head.args[1:] and one.kwargs == head.kwargs for one in calls)
    if head.target in (aten.select.int, operator.getitem):
        source, numbers = sources[0], [one.args[-1] for one in calls]
        if numbers != list(range(len(calls))) or any(one != source for one in sources):
            return None
        if head.target is aten.select.int:
            return Call(_first, (source, len(calls))) if all(one.args[1] == 0 for one in calls) else None
        if isinstance(source, Call) and source.target is aten.unbind.int and source.args[1:] in ((), (0,)):
            return Call(_first, (source.args[0], len(calls)))
        return None
    inner = _lifted(sources) if same and head.target in (aten.permute.default, aten._to_copy.default) else None
    if inner is None:
        return None
    if head.target is aten.permute.default:
        return Call(head.target, (inner, (0, *(dim + 1 for dim in head.args[1]))))
    return Call(head.target, (inner,), head.kwargs)


def _first(x: Tensor, count: int) -> Tensor:
    return x if x.shape[0] == count else x[:count]
