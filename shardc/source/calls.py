"""How the calls of a graph are written: what is called, with which arguments, and what has to be imported for it."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from shardc.analysis.timeline import is_started
from shardc.ir.facts import dtype_of
from shardc.runtime.kernels.parts import Part
from shardc.source.places import Spot, spread
from shardc.source.text import Brackets, Item, arguments, listed, values

_UNSAID = ("pin_memory", "layout", "memory_format")
"""Keywords that say how one device would hold a result."""

_IN_PLACE: dict[Any, torch._ops.OpOverload] = {
    torch.ops.aten.scatter_add.default: torch.ops.aten.scatter_add_.default,
    torch.ops.aten.index_add.default: torch.ops.aten.index_add_.default,
    torch.ops.aten.index_put.default: torch.ops.aten.index_put_.default,
}
"""Operators that copy their first operand, and write to few places of the copy; and those that write to it."""


_METHODS: dict[Any, str] = {
    torch.ops.aten.view.default: "reshape",  # a rank's part need not have the strides that the global view relied on
    torch.ops.aten.permute.default: "permute",
    torch.ops.aten.expand.default: "expand",
    torch.ops.aten.unsqueeze.default: "unsqueeze",
    torch.ops.aten.select.int: "select",
}
"""Views, and the methods of a tensor that they are written as."""

METHODS = frozenset({*_METHODS.values(), "t"})


def is_view(node: fx.Node) -> bool:
    """Whether a call is written as a method of what it views."""
    return node.target in _METHODS and not node.kwargs and isinstance(node.args[0], fx.Node)


class CallTexts:
    """The calls of one graph. `bodies` are the functions of users that it calls, with the names of their imports."""

    def __init__(self, graph: fx.Graph, taken: set[str]) -> None:
        self.nodes = [node for node in graph.nodes if node.op == "call_function"]
        self.imports = self._imports()
        taken.update(self.imports)
        self.bodies = self._bodies(taken)

    def parts(self, node: fx.Node, operands: Sequence[Spot], in_place: bool) -> list[Item]:
        """A call, to be written as a statement. `operands` are in the order of `repetition.operands_of`."""
        found = iter(operands)
        if node.target is operator.getitem:
            return [str(Spot(str(operands[0]), node.args[1]))]  # type: ignore[arg-type]
        shown = [_shown(argument, found) for argument in node.args]
        if is_view(node):
            return _method(node, str(shown[0]), shown[1:])
        for name, value in node.kwargs.items():
            if name in _UNSAID:
                continue
            if name == "device":
                shown.append("device=current().device")
            else:
                item = _shown(value, found)
                shown.append(f"{name}={item}")
        callee = str(_IN_PLACE[node.target]) if in_place else self.callee(node)
        return [f"{callee}{'.start' if is_started(node) else ''}", arguments(shown)]

    def callee(self, node: fx.Node) -> str:
        """What is called."""
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload):
            return str(target) if str(target).startswith("aten.") else f"torch.ops.{target}"
        return self.bodies.get(target) or target.__name__

    def _imports(self) -> set[str]:
        """What the calls need of the runtime."""
        ours = {c.target.__name__ for c in self.nodes if str(c.target.__module__).startswith("shardc.runtime")}  # type: ignore[union-attr]
        ours |= {type(v).__name__ for c in self.nodes for v in c.kwargs.values() if isinstance(v, Part)}
        return ours | {"current" for c in self.nodes if "device" in c.kwargs}

    def _bodies(self, taken: set[str]) -> dict[object, str]:
        """The functions that a graph calls and that are not ours, which are bodies of variants that users wrote, with
        the names under which they are imported: their own, unless another has it."""
        calls: list[Any] = [node.target for node in self.nodes if node.target is not operator.getitem]
        functions = {call for call in calls if not isinstance(call, torch._ops.OpOverload)}
        users = [function for function in functions if not function.__module__.startswith("shardc.runtime")]
        names: dict[object, str] = {}
        for function in sorted(users, key=lambda function: (function.__module__, function.__name__)):
            name, count = function.__name__, 0
            while name in taken:
                count += 1
                name = f"{function.__name__}_{count}"
            taken.add(name)
            names[function] = name
        return names


def _method(node: fx.Node, viewed: str, rest: Sequence[Item]) -> list[Item]:
    """`x.reshape(64, 32)`, `x.t()`."""
    if node.target is torch.ops.aten.permute.default and list(node.args[1]) == [1, 0]:  # type: ignore[arg-type]
        return [f"{viewed}.t", arguments([])]
    sizes = rest[0] if len(rest) == 1 and isinstance(rest[0], Brackets) and rest[0].items else None
    return [f"{viewed}.{_METHODS[node.target]}", arguments(rest if sizes is None else sizes.items)]


def imported(bodies: Mapping[Any, str]) -> list[str]:
    """The lines that import the bodies of users."""
    lines: list[str] = []
    for function, name in bodies.items():
        alias = "" if name == function.__name__ else f" as {name}"
        lines.append(f"from {function.__module__} import {function.__name__}{alias}")
    return lines


def _shown(value: Any, places: Iterator[Spot]) -> Item:
    if isinstance(value, fx.Node):
        return str(next(places))
    if isinstance(value, (list, tuple)):
        group = listed if isinstance(value, list) else values
        if value and all(isinstance(item, fx.Node) for item in value):
            return group(spread([next(places) for _ in value]))
        return group([_shown(item, places) for item in value])
    return shown(value)


def shown(value: Any) -> str:
    """A constant, as it is written; strings in double quotes."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, str):
        return f'"{value}"' if '"' not in value and "\\" not in value and value.isprintable() else repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{shown(key)}: {shown(one)}' for key, one in value.items())}}}"
    return quoted(repr(value))


def quoted(text: str) -> str:
    """What `repr` wrote, in double quotes."""
    return text.replace("'", '"') if '"' not in text and "\\" not in text else text


def may_write(node: fx.Node, own: bool) -> bool:
    """Whether an operator may write to its first operand, if the operand is the function's `own` and dies here: nobody
    else reads it, and it shares memory with nothing."""
    first = node.args[0] if node.target in _IN_PLACE else None
    if not own or not isinstance(first, fx.Node) or list(first.users) != [node]:
        return False
    makes: Any = first.target
    own_memory = isinstance(makes, torch._ops.OpOverload) and makes.namespace == "aten"
    return (
        own_memory
        and makes.is_view is False
        and list(node.args).count(first) == 1
        and dtype_of(first) == dtype_of(node)
    )
