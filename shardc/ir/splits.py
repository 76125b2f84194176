"""Splits: a layout over the atoms of a base value, and the steps that lead from one to another.

f32[32@dp, 64] +sum@tp    over atoms (32, 64)    Splits((("dp",), ()), (("tp", "sum"),))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from shardc.ir.mesh import Mesh
from shardc.runtime.collectives.all_gather import all_gather
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.runtime.collectives.all_to_all import all_to_all
from shardc.runtime.collectives.collective import AnyCollective
from shardc.runtime.collectives.reduce_scatter import reduce_scatter
from shardc.runtime.collectives.shard import shard
from shardc.runtime.collectives.to_partial import to_partial


class Splits(NamedTuple):
    """A layout over atoms: per atom the axes that split it, major to minor; per partial axis its reduction."""

    axes: tuple[tuple[str, ...], ...]
    partial: tuple[tuple[str, str], ...] = ()


class Step(NamedTuple):
    """One move: `all_gather`, `all_reduce`, `reduce_scatter`, `all_to_all`, `shard` or `to_partial` over `axis`.

    `source` and `target` are the atoms that lose and gain the axis, `op` the reduction; None where they play no part.
    """

    collective: AnyCollective
    axis: str
    source: int | None = None
    target: int | None = None
    op: str | None = None


def apply(splits: Splits, step: Step, mesh: Mesh) -> Splits:
    """The layout after a step."""
    axes, partial = list(splits.axes), dict(splits.partial)
    if step.source is not None:
        axes[step.source] = axes[step.source][:-1]
    if step.target is not None:
        axes[step.target] += (step.axis,)
    partial.pop(step.axis, None)
    if step.collective is to_partial:
        assert step.op is not None
        partial[step.axis] = step.op
    return Splits(tuple(axes), tuple((a, partial[a]) for a in mesh.names if a in partial))


def steps(splits: Splits, sizes: tuple[int, ...], mesh: Mesh, ops: tuple[str, ...]) -> Iterator[Step]:
    """Every move out of a layout. Only the minor-most axis of an atom can leave it."""
    partial = dict(splits.partial)
    holder = {axis: atom for atom, axes in enumerate(splits.axes) for axis in axes}

    def free(axis: str) -> list[int]:
        """The atoms that `axis` could split next."""
        return [a for a, held in enumerate(splits.axes) if mesh.splits(sizes[a], (*held, axis))]

    for axis, ways in mesh.axes:
        if ways == 1:
            continue
        if axis in partial:
            yield Step(all_reduce, axis, op=partial[axis])
            yield from (Step(reduce_scatter, axis, target=atom, op=partial[axis]) for atom in free(axis))
        elif axis not in holder:
            yield from (Step(shard, axis, target=atom) for atom in free(axis))
            yield from (Step(to_partial, axis, op=op) for op in ops if not partial or op in partial.values())
        elif splits.axes[holder[axis]][-1] == axis:
            atom = holder[axis]
            yield Step(all_gather, axis, source=atom)
            yield from (Step(all_to_all, axis, source=atom, target=to) for to in free(axis) if to != atom)
