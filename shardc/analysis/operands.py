"""Which nodes of a lowered graph are collectives, and how much each moves."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from shardc.ir.facts import dtype_of, laid
from shardc.ir.mesh import Mesh
from shardc.runtime.collectives.bucket import Bucket
from shardc.runtime.collectives.collective import AnyCollective, Collective


def collective_of(node: fx.Node) -> AnyCollective | None:
    """The collective that a node calls; None for other nodes."""
    target: Any = node.target
    return target if isinstance(target, Collective) else None


def operand_bytes(node: fx.Node, mesh: Mesh) -> list[int]:
    """Bytes of a collective's local operand, padded to whole chunks; for a bucket, of each of its operands."""
    collective: Any = node.target
    ways, options = mesh.sizes[str(node.kwargs["axis"])], node.kwargs
    if isinstance(collective, Bucket):
        sources: Any = node.args[0]
        return [
            _size(source, collective.padded(_shape(source, mesh), ways, member))
            for source, member in zip(sources, collective.members(options, len(sources)), strict=True)
        ]
    source: Any = node.args[0]
    return [_size(source, collective.padded(_shape(source, mesh), ways, options))]


def _shape(node: fx.Node, mesh: Mesh) -> tuple[int, ...]:
    return laid(node).local_shape(mesh)


def _size(node: fx.Node, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype_of(node).itemsize
