"""Masks that are a function of a few numbers of each query and of each key.

    %m = eq(view(%documents, [2, 1, 4096, 1]), view(%documents, [2, 1, 1, 4096]))
        ->    the formula "eq(q0, k0)" of %documents for queries, and of %documents for keys

What computes with one element for each pair becomes the formula; what has one for each query, or key, its operands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from shardc.capture.torch_patches.experts import call_text
from shardc.ir.program import value_of

aten: Any = torch.ops.aten
_MOST = 8
"""Numbers of a query, or of a key, at most."""


@dataclass
class MaskFormula:
    """`sees`, a formula of `queries` q0, q1, ... and `keys` k0, k1, ...: nodes with one number for each, which
    broadcast to [batch, ..., rows, 1] and [batch, ..., 1, columns]."""

    sees: str = ""
    queries: list[fx.Node] = field(default_factory=list[fx.Node])
    keys: list[fx.Node] = field(default_factory=list[fx.Node])


def formula_of(node: fx.Node, lengths: tuple[Any, Any], into: MaskFormula) -> str | None:
    """How a mask of booleans, which may have a dim for the batch, follows from numbers of its queries and keys, of
    which there are `lengths`, as a formula; the numbers are added to those of `into`. None if that is not known."""
    if value_of(node).dtype != torch.bool or 1 in lengths:
        return None
    found = MaskFormula("", [*into.queries], [*into.keys])
    try:
        text = _Writer(found, lengths).of(node)
    except LookupError:
        return None
    if not found.queries or not found.keys or max(len(found.queries), len(found.keys)) > _MOST:
        return None
    into.queries, into.keys = found.queries, found.keys
    return text


class _Writer:
    def __init__(self, found: MaskFormula, lengths: tuple[int, int]) -> None:
        self._found, self._lengths = found, lengths

    def __call__(self, node: fx.Node, batch: int) -> str:
        """A node as text, whose dim `batch`, counted from the end, is that of the batch. Raises LookupError for what is
        none of a formula."""
        value = value_of(node)
        if not isinstance(value, Tensor) or any(dim != batch for dim in _wide(value)):
            raise LookupError(node.name)
        dims: tuple[int, ...] = (1, 1, *value.shape)[-2:]
        if 1 in dims:
            return self._number(node, dims[1])
        if dims != self._lengths or node.op != "call_function":
            raise LookupError(node.name)
        target: Any = node.target
        if target is aten.view.default:
            return self.of(node.args[0])  # type: ignore[arg-type]  # (dims of one element come or go)
        if target in (aten.expand.default, aten.clone.default):
            return self(node.args[0], batch)  # type: ignore[arg-type]
        text = call_text(node, {one: self(one, batch) for one in node.all_input_nodes})
        if text is None:
            raise LookupError(node.name)
        return text

    def of(self, source: fx.Node) -> str:
        """A node as text, whose only dim of several elements before that of rows, if it has one, is the batch's."""
        value = value_of(source)
        if (1, 1, *value.shape)[-2:] != self._lengths or len(wide := _wide(value)) > 1:
            raise LookupError(source.name)
        return self(source, wide[0] if wide else 0)

    def _number(self, node: fx.Node, columns: int) -> str:
        value = value_of(node)
        if value.is_floating_point() or value.is_complex():
            raise LookupError(node.name)
        names, letter = (self._found.keys, "k") if columns != 1 else (self._found.queries, "q")
        if node not in names:
            names.append(node)
        text = f"{letter}{names.index(node)}"
        return f"to({text}, bool)" if value.dtype == torch.bool else text


def _wide(x: Tensor) -> list[int]:
    """The dims before the last two that have more than one element, counted from the end."""
    return [dim - x.ndim for dim in range(x.ndim - 2) if x.shape[dim] != 1]


def stacked(nodes: list[fx.Node], length: int, add: Callable[..., fx.Node]) -> fx.Node:
    """The numbers of all queries, or keys: integers `[number, batch or 1, length]`."""
    batch = max(value_of(node).numel() // _length(node) for node in nodes)
    parts: list[fx.Node] = []
    for node in nodes:
        own, each = value_of(node), _length(node)
        part = add(aten.view.default, node, [1, own.numel() // each, each])
        part = part if own.dtype == torch.int64 else add(aten._to_copy.default, part, dtype=torch.int64)
        same = tuple(value_of(part).shape) == (1, batch, length)
        parts.append(part if same else add(aten.expand.default, part, [1, batch, length]))
    return parts[0] if len(parts) == 1 else add(aten.cat.default, parts, 0)


def _length(node: fx.Node) -> int:
    """How many numbers a node has for one element of the batch."""
    dims = (1, 1, *value_of(node).shape)
    return dims[-1] if dims[-1] != 1 else dims[-2]
