"""Meshes worth planning: all ways to arrange a number of devices that the hardware can tell apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from shardc.cost.hardware import Hardware
from shardc.ir.mesh import Mesh
from shardc.runtime.collectives.all_reduce import all_reduce


def meshes(devices: int, axes: Sequence[str], device: Hardware, annotated: bool) -> list[Mesh]:
    """The meshes worth planning, those of few axes first. With annotations, which name axes, every axis is kept, if
    need be with size 1, and no two meshes are alike."""
    found: dict[object, Mesh] = {}
    for sizes in sorted(factorisations(devices, len(axes)), key=lambda sizes: (sum(n > 1 for n in sizes), sizes)):
        kept = [n for n in sizes if n > 1] or [1]
        mesh = Mesh(tuple(zip(axes, sizes if annotated else kept, strict=False)))
        found.setdefault(sizes if annotated else _wiring(mesh, device), mesh)
    return list(found.values())


def factorisations(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as an ordered product of so many factors."""
    if factors == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        yield from ((first, *rest) for rest in factorisations(number // first, factors - 1))


def _wiring(mesh: Mesh, device: Hardware) -> tuple[tuple[object, ...], ...]:
    """What tells a mesh from another when axes have no names, distance apart: sizes, and links of every axis."""
    parts: list[tuple[object, ...]] = []
    for place, (axis, ways) in enumerate(mesh.axes):
        wires = device.wires(mesh, axis, all_reduce)
        inner = min(device.devices_per_node, math.prod(n for _, n in mesh.axes[place + 1 :]))
        parts.append((ways, wires.near, inner if wires.nodes > 1 else 0))
    return tuple(sorted(parts, key=repr))
