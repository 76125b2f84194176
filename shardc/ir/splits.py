"""Splits: a layout over the atoms of a base value, and the steps that lead from one to another.

f32[32@dp, 64] +sum@tp    over atoms (32, 64)    Splits((("dp",), ()), (("tp", "sum"),))
f32[32@dp~folded, 64]     over atoms (32, 64)    Splits((("dp~folded",), ()))
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
from shardc.runtime.collectives.reorder import reorder
from shardc.runtime.collectives.shard import shard
from shardc.runtime.collectives.to_partial import to_partial
from shardc.runtime.mesh.orders import BLOCKS, FOLDED, axis_of, in_order, order_of

Folds = tuple[tuple[str, ...], ...]
"""Per atom the axes that may deal it out folded; empty where none may for any atom."""


class Splits(NamedTuple):
    """A layout over atoms: per atom the axes that split it, major to minor; per partial axis its reduction."""

    axes: tuple[tuple[str, ...], ...]
    partial: tuple[tuple[str, str], ...] = ()


class Step(NamedTuple):
    """One move: `all_gather`, `all_reduce`, `reduce_scatter`, `all_to_all`, `shard`, `to_partial` or `reorder` over
    `axis`.

    `source` and `target` are the atoms that lose and gain the axis, `op` the reduction; None where they play no part.
    The axis dealt out the source in `source_order`, and deals out the target in `target_order`.
    """

    collective: AnyCollective
    axis: str
    source: int | None = None
    target: int | None = None
    op: str | None = None
    source_order: str = BLOCKS
    target_order: str = BLOCKS

    @property
    def orders(self) -> dict[str, str]:
        """The keywords that tell the collective about orders."""
        return self.collective.orders(self.source_order, self.target_order)


def apply(splits: Splits, step: Step, mesh: Mesh) -> Splits:
    """The layout after a step."""
    axes, partial = list(splits.axes), dict(splits.partial)
    if step.source is not None:
        axes[step.source] = axes[step.source][:-1]
    if step.target is not None:
        axes[step.target] += (in_order(step.axis, step.target_order),)
    partial.pop(step.axis, None)
    if step.collective is to_partial:
        assert step.op is not None
        partial[step.axis] = step.op
    return Splits(tuple(axes), tuple((a, partial[a]) for a in mesh.names if a in partial))


def steps(
    splits: Splits, sizes: tuple[int, ...], mesh: Mesh, ops: tuple[str, ...], folds: Folds = ()
) -> Iterator[Step]:
    """Every move out of a layout. Only the minor-most axis of an atom can leave it."""
    partial = dict(splits.partial)
    holder = {axis_of(axis): atom for atom, axes in enumerate(splits.axes) for axis in axes}

    def free(axis: str) -> list[tuple[int, str]]:
        """The atoms that `axis` could split next, each with the order in which it deals them out."""
        plain = [(a, BLOCKS) for a, held in enumerate(splits.axes) if mesh.splits(sizes[a], (*held, axis))]
        return plain + [(a, FOLDED) for a in folded(axis, sizes, mesh, folds) if not splits.axes[a]]

    for axis, ways in mesh.axes:
        if ways == 1:
            continue
        if axis in partial:
            yield Step(all_reduce, axis, op=partial[axis])
            for atom, order in free(axis):
                yield Step(reduce_scatter, axis, target=atom, op=partial[axis], target_order=order)
        elif axis not in holder:
            yield from (Step(shard, axis, target=atom, target_order=order) for atom, order in free(axis))
            yield from (Step(to_partial, axis, op=op) for op in ops if not partial or op in partial.values())
        elif axis_of(splits.axes[holder[axis]][-1]) == axis:
            atom = holder[axis]
            order = order_of(splits.axes[atom][-1])
            yield Step(all_gather, axis, source=atom, source_order=order)
            for to, other in free(axis):
                if to != atom:
                    yield Step(all_to_all, axis, source=atom, target=to, source_order=order, target_order=other)
            if len(splits.axes[atom]) == 1 and atom in folded(axis, sizes, mesh, folds):
                other = BLOCKS if order == FOLDED else FOLDED
                yield Step(reorder, axis, source=atom, target=atom, source_order=order, target_order=other)


def folded(axis: str, sizes: tuple[int, ...], mesh: Mesh, folds: Folds) -> list[int]:
    """The atoms that `axis` may deal out folded."""
    split = (in_order(axis, FOLDED),)
    return [a for a, axes in enumerate(folds) if axis in axes and mesh.splits(sizes[a], split)]
