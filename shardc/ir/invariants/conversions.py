"""What a conversion does to a layout, as the steps of `shardc.ir.splits` have it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import fx

from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh
from shardc.ir.splits import Splits, Step, apply, steps
from shardc.runtime.collectives.bucket import Bucket
from shardc.runtime.collectives.collective import AnyCollective, Collective, wait
from shardc.runtime.collectives.reductions import REDUCTIONS
from shardc.runtime.mesh.orders import BLOCKS, axis_of, order_of


class ConversionCall(NamedTuple):
    """One value in another layout: the collective, alone or in a bucket, its operand, and its keywords."""

    collective: AnyCollective
    operand: fx.Node
    told: Mapping[str, Any]


def conversion_of(node: fx.Node) -> ConversionCall | None:
    """The conversion that a node is, or as a piece of a bucket is the result of."""
    if isinstance(node.target, Collective) and not isinstance(node.target, Bucket):
        return ConversionCall(node.target, node.args[0], node.kwargs)  # type: ignore[arg-type]
    if node.target is operator.getitem:
        source: Any = node.args[0]
        bucket = source.args[0] if source.target is wait else source
        if isinstance(bucket.target, Bucket):
            return _piece(bucket, node.args[1])  # type: ignore[arg-type]
    return None


def _piece(bucket: fx.Node, index: int) -> ConversionCall:
    joined: Any = bucket.target
    sources: Any = bucket.args[0]
    told = joined.members(bucket.kwargs, len(sources))[index]
    shared = {name: bucket.kwargs[name] for name in ("axis", "op") if name in bucket.kwargs}
    return ConversionCall(joined.of, sources[index], {**told, **shared})


def misplaced(conversion: ConversionCall, before: Layout, after: Layout, mesh: Mesh) -> str:
    """What is wrong with the layouts before and after a conversion; empty where they are right."""
    collective, _, told = conversion
    axis, ways = told["axis"], mesh.sizes.get(told["axis"], 1)
    shown = f"from {before} to {after}"
    if _sizes(before) != _sizes(after) or before.shape != after.shape:
        return f"{shown}: the atoms have changed"
    step = _step(collective, axis, told.get("op"), before, after)
    splits = Splits(_axes(before), before.partial)
    foldable = (mesh.names,) * len(_sizes(before))
    if ways > 1 and step not in steps(splits, _sizes(before), mesh, tuple(REDUCTIONS), foldable):
        return f"no {collective.name} over {axis} leads {shown}"
    reached = apply(splits, step, mesh)
    if reached != Splits(_axes(after), after.partial):
        return f"{shown}: {collective.name} over {axis} leads to {_text(reached, before)}"
    dims = [_dim(before, atom, mesh) for atom in (step.source, step.target)]
    if None in [dim for dim, atom in zip(dims, (step.source, step.target), strict=True) if atom is not None]:
        return f"{shown}: the atom that moves has others before it in its dim"
    wanted = {**collective.dims(*dims), **step.orders}
    if any(told.get(name) != dim for name, dim in wanted.items()):
        return f"{shown} is a move along {wanted}, not { ({name: told.get(name) for name in wanted}) }"
    if any("order" in name and name not in wanted for name in told):
        return f"{shown} is a move along {wanted}, and {collective.name} is told of another order"
    return missized(conversion, before, after, mesh)


def missized(conversion: ConversionCall, before: Layout, after: Layout, mesh: Mesh) -> str:
    """What is wrong with the shape of the rank's part; empty where it is right."""
    local, made = before.local_shape(mesh), after.local_shape(mesh)
    gives = conversion.collective.shape(local, mesh.sizes[conversion.told["axis"]], conversion.told)
    return "" if gives == made else f"of a part {list(local)} it makes {list(gives)}, {after} is {list(made)}"


def _step(collective: AnyCollective, axis: str, op: str | None, before: Layout, after: Layout) -> Step:
    """The step that would lead from one layout to the other: where the axis was, and where it is."""
    held, holds = (
        [(i, order_of(one)) for i, axes in enumerate(_axes(layout)) for one in axes if axis_of(one) == axis]
        for layout in (before, after)
    )
    reduced = dict((*before.partial, *after.partial))
    return Step(
        collective, axis,
        held[0][0] if held else None,
        holds[0][0] if holds else None,
        (op or "sum") if axis in reduced else None,
        held[0][1] if held else BLOCKS,
        holds[0][1] if holds else BLOCKS,
    )  # fmt: skip


def _axes(layout: Layout) -> tuple[tuple[str, ...], ...]:
    return tuple(atom.axes for dim in layout.dims for atom in dim)


def _sizes(layout: Layout) -> tuple[int, ...]:
    return tuple(atom.size for dim in layout.dims for atom in dim)


def _dim(layout: Layout, place: int | None, mesh: Mesh) -> int | None:
    """The dim on which a move of an atom acts directly: all atoms before it in its dim have one element a rank."""
    for index, dim in enumerate(layout.dims):
        if place is not None and place < len(dim):
            return index if all(mesh.chunk(atom.size, atom.axes) == 1 for atom in dim[:place]) else None
        place = None if place is None else place - len(dim)
    return None


def _text(splits: Splits, like: Layout) -> str:
    """Splits as a layout of the same dims."""
    rest = iter(splits.axes)
    dims = tuple(tuple(type(atom)(atom.size, next(rest)) for atom in dim) for dim in like.dims)
    return str(Layout(dims, splits.partial))
