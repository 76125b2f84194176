"""Graphs as text: one line a value, in Python-like calls, with the layout of every value."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from shardc.ir.facts import FACTS, Captured, Lowered
from shardc.ir.layout import SHORT_DTYPES, Layout
from shardc.ir.mesh import Mesh
from shardc.ir.program import name_of, where
from shardc.ir.versions import GraphLine


def printed(
    lines: Iterable[GraphLine], mesh: Mesh | None = None, layouts: Mapping[fx.Node, Layout] | None = None
) -> str:
    """The text. Values that have a layout, in their facts or among `layouts`, show it, others their shape."""
    return "".join(f"{_text(line, mesh, layouts or {})}\n" for line in lines)


def _text(line: GraphLine, mesh: Mesh | None, layouts: Mapping[fx.Node, Layout]) -> str:
    if line.node.op == "output":
        return f"return {_argument(line.args[0])}"
    call = "input" if line.node.op == "placeholder" else call_text(line)
    assigned = f"%{line.node.name} = {call}"
    told = where(line.node)
    place = f"  # {told}" if told else ""
    return f"{assigned:<72}  {type_text(line, mesh, layouts):<32}{place}".rstrip()


def call_text(line: GraphLine) -> str:
    """`mm(%x, %w)`: what a line calls."""
    target = line.target
    if target is operator.getitem:
        return f"{_argument(line.args[0])}[{line.args[1]}]"
    shown = [_argument(a) for a in line.args]
    shown += [f"{k}={_argument(v)}" for k, v in line.kwargs.items() if k not in ("device", "pin_memory", "layout")]
    return f"{name_of(target)}({', '.join(shown)})"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(v) for v in value)}]"  # type: ignore[misc]
    return str(value)


def type_text(line: GraphLine, mesh: Mesh | None, layouts: Mapping[fx.Node, Layout]) -> str:
    """`f32[32@tp]`: dtype, and layout or shape; "" where a value has neither."""
    facts = line.meta.get(FACTS)
    if isinstance(facts, Lowered):
        layout, value, dtype = facts.layout, None, facts.dtype
    else:
        value = facts.value if isinstance(facts, Captured) else None
        layout, dtype = layouts.get(line.node), getattr(value, "dtype", None)
    if layout is not None and dtype is not None:
        return f"{SHORT_DTYPES[dtype]}{layout.simplify(mesh) if mesh else layout}"
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
