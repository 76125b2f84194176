"""The tables of slots. Those of repeated layers are written once, with the number of the layer in their names.

INPUTS = (
    Slot("parameter", "embed.weight", 0, (256, 64), "float32", ((0, 1, "tp"),)),  # f32[256@tp, 64]
    *(
        slot
        for i in range(32)
        for slot in (
            Slot("parameter", f"layers.{i}.up.weight", 0, (64, 64), "float32", ()),
        )
    ),
)
GRADIENTS = tuple(slot.gradient for slot in INPUTS if slot.role == "parameter")

The layout stands beside what is split.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import fx

from shardc.ir.facts import dtype_of, laid
from shardc.ir.layout import SHORT_DTYPES
from shardc.ir.mesh import Mesh
from shardc.ir.program import Port, Program, Role
from shardc.source.calls import shown
from shardc.source.text import WIDTH, Brackets, arguments, written

LEAST_TURNS = 3
"""Layers of which a table is written once."""

LEAST_ALIKE = 3
"""Gradients that are written as those of all parameters."""


class Row(NamedTuple):
    """A slot: what stands before its name, the name, what stands behind, and its layout if a dim is split."""

    role: str
    name: str
    rest: tuple[str, ...]
    typed: str


def rows(slots: Sequence[tuple[fx.Node, Port]], program: Program, mesh: Mesh) -> list[Row]:
    """The slots of values with their ports."""
    found: list[Row] = []
    for node, port in slots:
        layout = laid(node).simplify(mesh)
        shape, divided = list(layout.shape), program.microbatches
        if divided is not None and port in divided.dims:
            shape[divided.dims[port]] *= divided.count
        rest = [str(port.index), shown(tuple(shape)), shown(str(dtype_of(node)).removeprefix("torch."))]
        cuts = layout.cuts(mesh)
        rest.append(shown(cuts))
        rest += _turns_of(port, program)
        facts: Sequence[tuple[str, Mapping[Port, tuple[int, ...]]]] = (
            ("order", program.orders), ("depends_on", program.depends_on)
        )  # fmt: skip
        rest += [f"{name}={shown(told[port])}" for name, told in facts if port in told]
        typed = f"{SHORT_DTYPES[dtype_of(node)]}{layout}" if cuts else ""
        found.append(Row(shown(port.role.value), port.name, tuple(rest), typed))
    return found


def _turns_of(port: Port, program: Program) -> list[str]:
    """How what a micro-batch takes or makes is to be understood: as a part of a dim, as an addend, or as the same."""
    divided = program.microbatches
    if divided is None:
        return []
    if port in divided.dims:
        return [f"batch={shown((divided.dims[port], divided.count))}"]
    return ["sums=True"] if port in divided.sums else []


def table(name: str, slots: Sequence[Row]) -> list[str]:
    """The lines of one table."""
    if not slots:
        return [f"{name} = ()"]
    if len(slots) == 1 and not slots[0].typed:
        (row,) = slots
        line = "".join(_slot(row, shown(row.name), 0))
        if len(f"{name} = ({line})") <= WIDTH:
            return [f"{name} = ({line})"]
    lines, at = [f"{name} = ("], 0
    while at < len(slots):
        first, width, turns = _turns(slots, at)
        if not turns:
            lines += _slot(slots[at], shown(slots[at].name), 1)
            at += 1
            continue
        span = f"{first}, {first + turns}" if first else str(turns)
        lines += ["    *(", "        slot", f"        for i in range({span})", "        for slot in ("]
        for row in slots[at : at + width]:
            lines += _slot(row, f'f"{_numbered(row.name)}"', 3)
        lines += ["        )", "    ),"]
        at += width * turns
    return [*lines, ")"]


def gradients(inputs: Sequence[Row], slots: Sequence[Row]) -> list[str]:
    """The lines of the table of gradients: of one line where they lie as the parameters do."""
    role = shown(Role.GRADIENT.value)
    alike = [row._replace(role=role) for row in inputs if row.role == shown(Role.PARAMETER.value)]
    if len(slots) < LEAST_ALIKE or alike != list(slots):
        return table("GRADIENTS", slots)
    return ['GRADIENTS = tuple(slot.gradient for slot in INPUTS if slot.role == "parameter")']


def _slot(row: Row, name: str, level: int) -> list[str]:
    group: Brackets = arguments([row.role, name, *row.rest])
    lines = written(["Slot", group], level, row.typed)
    *above, last = lines
    code, mark, comment = last.partition("  # ")
    return [*above, f"{code},{mark}{comment}"]


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _numbered(name: str, number: str = "{i}") -> str:
    """The name with its first number replaced."""
    return _NUMBER.sub(number, name, count=1)


def _turns(slots: Sequence[Row], at: int) -> tuple[int, int, int]:
    """The number of the layer whose slots begin at `at`, how many these are, and how many equal layers follow, this one
    included; 0 layers where it is not worth it."""

    def number(place: int) -> str:
        found = _NUMBER.search(slots[place].name) if place < len(slots) else None
        return found.group() if found else ""

    first = number(at)
    if not first:
        return 0, 0, 0
    width = 1
    while number(at + width) == first:
        width += 1
    turns = 1
    while at + (turns + 1) * width <= len(slots):
        layer = slots[at + turns * width : at + (turns + 1) * width]
        alike = all(
            other == row._replace(name=_numbered(row.name, str(int(first) + turns))) and "{" not in row.name
            for row, other in zip(slots[at : at + width], layer, strict=True)
        )
        if not alike:
            break
        turns += 1
    return (int(first), width, turns) if turns >= LEAST_TURNS else (0, 0, 0)
