"""Whether two traces of a model compute the same, where all selections are empty.

out = out + where(mask, y, 0)     of one trace, where a mask that selects rows is false,
out                               is what the other, in which code was told so, has
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from shardc.capture.experts.networks import operand
from shardc.capture.experts.routing import is_filled
from shardc.ir.program import value_of

aten: Any = torch.ops.aten
_VIEWS = frozenset(
    {aten.view.default, aten.expand.default, aten._to_copy.default, aten.clone.default, aten.permute.default}
)
_ZERO = "zero"


class Outlines:
    """Numbers for values: those that are computed alike have one, also in different graphs."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def of(self, graph: fx.Graph, results: Collection[fx.Node | None], false: Collection[fx.Node]) -> list[Any]:
        """The numbers of `results`, where the masks in `false` are."""
        known: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "call_function":
                known[node] = self._call(node, known, node in false)
            elif node.op != "output":
                known[node] = self._number((node.op, len(known), _form(node)))
        return [None if node is None else known[node] for node in results]

    def _call(self, node: fx.Node, known: dict[fx.Node, Any], false: bool) -> Any:
        zero = self._number((_ZERO, _form(node)))
        if false or is_filled(node, 0):
            return zero
        args, kwargs = fx.map_arg((tuple(node.args), dict(node.kwargs)), known.__getitem__)
        zeros = [isinstance(one, fx.Node) and known[one] == self._number((_ZERO, _form(one))) for one in node.args]
        target: Any = node.target
        if target is aten.detach.default:
            return args[0]
        if (target in _VIEWS and zeros[0]) or (target in (aten.mul.Tensor, aten.bitwise_and.Tensor) and any(zeros)):
            return zero
        if target is aten.where.self and zeros[0]:
            return (
                args[2]
                if _form(node.args[2]) == _form(node)
                else zero
                if zeros[2]
                else self._plain(target, args, kwargs)
            )
        if target is aten.add.Tensor and any(zeros) and not node.kwargs:
            other = args[1 if zeros[0] else 0]
            source = node.args[1 if zeros[0] else 0]
            if isinstance(source, fx.Node) and _form(source) == _form(node):
                return other
        if target in _VIEWS and isinstance(operand(node), fx.Node) and target is not aten.permute.default:
            inner = operand(node)
            if target is aten.clone.default or (target is aten.view.default and _form(inner) == _form(node)):
                return args[0]
            if target is aten.view.default:  # a view of a view is a view of the first
                first = inner
                while first.target in (aten.view.default, aten.clone.default):
                    first = operand(first)
                return known[first] if _form(first) == _form(node) else self._plain(target, (known[first], args[1]), {})
        return self._plain(target, args, kwargs)

    def _plain(self, target: Any, args: Any, kwargs: Any) -> int:
        return self._number((str(target), str(args), str(kwargs)))

    def _number(self, key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))


def _form(node: Any) -> Any:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else None
