"""Which part of a tensor every rank holds, as data that the page draws.

    4096@tp on tp=2              part 0: [[0, 2048]]               part 1: [[2048, 2048]]
    4096@tp~folded on tp=2       part 0: [[0, 1024], [3072, 1024]] part 1: [[1024, 2048]]

Parts of a dim are numbered by the coordinates on the axes that split it, the first of `axes` slowest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from shardc.ir.layout import Atom, Layout, P, S
from shardc.ir.mesh import Mesh
from shardc.runtime.mesh.orders import FOLDED, axis_of, extent, order_of, runs_of

MOST_RUNS = 64
"""Runs of one part that are listed; further ones are counted."""

Run = list[int]
"""Where neighbours of a dim start, and how many they are."""


class Pictures:
    """The layouts of a report, each once: `number` gives a layout's place in `layouts`."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.layouts: list[dict[str, Any]] = []
        self.dims: list[dict[str, Any]] = []
        self._layouts: dict[str, int] = {}
        self._dims: dict[tuple[Atom, ...], int] = {}

    def number(self, layout: Layout) -> int:
        text = str(layout)
        if text not in self._layouts:
            self._layouts[text] = len(self.layouts)
            self.layouts.append(self._layout(layout))
        return self._layouts[text]

    def _layout(self, layout: Layout) -> dict[str, Any]:
        return {
            "text": str(layout),
            "shape": list(layout.shape),
            "local": list(layout.local_shape(self.mesh)),
            "axes": [[axis, *self._placement(layout, axis)] for axis in self.mesh.names],
            "dims": [self._dim(dim) for dim in layout.dims],
        }

    def _placement(self, layout: Layout, axis: str) -> tuple[str, str]:
        """What an axis does, in a word and in a sentence."""
        placement = layout.placement(axis)
        if isinstance(placement, P):
            return "partial", f"partial: every rank of {axis} holds a part, and their {placement.op} is the value"
        if isinstance(placement, S):
            folded = any(f"{axis}~{FOLDED}" in atom.axes for atom in layout.dims[placement.dim])
            order = ", folded: a rank has one piece from the front and one from the back" if folded else ""
            return "split", f"split: {axis} splits dim {placement.dim}{order}"
        return "broadcast", f"broadcast: all ranks of {axis} hold the same"

    def _dim(self, dim: tuple[Atom, ...]) -> int:
        if dim not in self._dims:
            self._dims[dim] = len(self.dims)
            self.dims.append(self._parts(dim))
        return self._dims[dim]

    def _parts(self, dim: tuple[Atom, ...]) -> dict[str, Any]:
        axes = [axis for atom in dim for axis in atom.axes]
        places = itertools.product(*(range(self.mesh.ranks[axis]) for axis in axes))
        parts = [runs_of_dim(dim, dict(zip(axes, place, strict=True)), self.mesh) for place in places]
        size = math.prod(atom.size for atom in dim)
        return {"size": size, "axes": [axis_of(axis) for axis in axes], "parts": [part[:MOST_RUNS] for part in parts],
                "more": max(0, max(map(len, parts)) - MOST_RUNS)}  # fmt: skip


def runs_of_dim(dim: Sequence[Atom], place: dict[str, int], mesh: Mesh) -> list[Run]:
    """What the rank at `place` (a coordinate an axis, as layouts write axes) has of a dim, without padding."""
    first, *minor = dim
    runs = _runs_of_atom(first, place, mesh)
    if not minor:
        return runs
    inner, size = runs_of_dim(minor, place, mesh), math.prod(atom.size for atom in minor)
    if inner == [[0, size]]:
        return [[start * size, length * size] for start, length in runs]
    positions = (position for start, length in runs for position in range(start, start + length))
    return [[position * size + start, length] for position in positions for start, length in inner]


def _runs_of_atom(atom: Atom, place: dict[str, int], mesh: Mesh) -> list[Run]:
    blocks = [axis for axis in atom.axes if order_of(axis) != FOLDED]
    start, _, valid = extent(atom.size, [mesh.ranks[axis] for axis in blocks], [place[axis] for axis in blocks])
    folded = [axis for axis in atom.axes if order_of(axis) == FOLDED]  # the last, if any
    if not folded:
        return [[start, valid]] if valid else []
    pieces = runs_of(FOLDED, valid, mesh.ranks[folded[0]], place[folded[0]])
    joined: list[Run] = []
    for first, length in pieces:
        if joined and sum(joined[-1]) == start + first:
            joined[-1][1] += length
        else:
            joined.append([start + first, length])
    return joined
