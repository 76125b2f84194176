"""Graphs as text: one line a value, in Python-like calls, with the layout of every value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from shardc.graph import where
from shardc.layout import SHORT_DTYPES
from shardc.mesh import Mesh


def show(graph: fx.Graph, mesh: Mesh | None = None) -> str:
    """Print a graph; values that have a layout show it, others their shape."""
    lines: list[str] = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {_argument(node.args[0])}")
            continue
        call = "input" if node.op == "placeholder" else _call(node)
        assigned = f"%{node.name} = {call}"
        lines.append(f"{assigned:<72}  {_type(node, mesh):<32}{_place(node)}".rstrip())
    return "\n".join(lines) + "\n"


def _place(node: fx.Node) -> str:
    return f"  # {where(node)}" if where(node) else ""


def _call(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return f"{_argument(node.args[0])}[{node.args[1]}]"
    target = node.target
    name = target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else target.__name__  # type: ignore[union-attr]
    shown = [_argument(a) for a in node.args]
    shown += [f"{k}={_argument(v)}" for k, v in node.kwargs.items() if k not in ("device", "pin_memory", "layout")]
    return f"{name}({', '.join(shown)})"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(v) for v in value)}]"  # type: ignore[misc]
    return str(value)


def _type(node: fx.Node, mesh: Mesh | None) -> str:
    layout = node.meta.get("layout")
    if layout is not None:
        return f"{SHORT_DTYPES[node.meta['dtype']]}{layout.simplify(mesh) if mesh else layout}"
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{SHORT_DTYPES.get(value.dtype, value.dtype)}[{', '.join(str(int(n)) for n in value.shape)}]"
    return ""


def columns(rows: Sequence[Sequence[str]], aligned: str) -> list[str]:
    """Rows as lines of columns, each aligned left or right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shape = list(zip(aligned, widths, strict=True))
    return ["  ".join(f"{cell:{a}{w}}" for cell, (a, w) in zip(row, shape, strict=True)).rstrip() for row in rows]


def in_seconds(value: float) -> str:
    """`12.30 us`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value / 1e-9:.2f} ns" if value else "0 s"


def in_bytes(value: float) -> str:
    """`4.0 KiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"
