"""Variants in which one axis splits two factors of an operator, and parts of a tensor go round along it.

m k, k n -> m n  on tp=4     operand 0 goes round, tp splits n and m:  demands [m@tp, k] and [k, n@tp], makes [m, n@tp]
                             sums go round, tp splits k and m:         demands [m, k@tp] and [k@tp, n], makes [m@tp, n]

A factor here is an atom: of `(b s)`, either may go round. Only one axis of an operator does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from shardc.ir.layout import is_folded
from shardc.ir.mesh import Mesh
from shardc.rules.notation import Variant
from shardc.rules.ring import Ring
from shardc.runtime.kernels.parts import Part
from shardc.runtime.kernels.widening import LOW
from shardc.runtime.mesh.orders import axis_of

if TYPE_CHECKING:
    from shardc.rules.factors.strategy import Shape, Side, Strategy

Axes = tuple[tuple[str, ...], ...]
Pair = tuple[int, int]


class Circle(NamedTuple):
    """The axis of a ring, the factor that it splits of what stays, and the factor that it splits of what goes round."""

    axis: str
    inside: int
    around: int


def pairs_of(shape: Shape) -> dict[str, tuple[Pair, ...]]:
    """For each variant with a ring the factors, what stays and what goes round, that one axis may split. Of what stays,
    that is the major atom; of what goes round one of two, as of a batch of sequences.

    A bias along what goes round, which would have to go round beside it, rules a pair out.
    """
    result = shape.results[0]

    def alone(ring: Ring, inside: int, around: int) -> bool:
        others = [side for place, side in enumerate(shape.operands) if place != ring.operand]
        both = {inside, around} <= result.carried
        return not (both and any(around in side.carried and inside not in side.carried for side in others))

    found: dict[str, tuple[Pair, ...]] = {}
    free = [(i, factor) for i, factor in enumerate(shape.factors) if not factor.whole]
    for variant, ring in ((variant, variant.ring) for variant in shape.variants):
        if ring is not None:
            pairs = [
                (i, j)
                for stays, goes in ring.pairs
                for i, one in free
                for j, other in free
                if (one.name, one.index) == (stays, 0) and other.name == goes and other.index < 2
            ]
            found[variant.name] = tuple(pair for pair in pairs if alone(ring, *pair))
    return found


def circle_of(shape: Shape, strategy: Strategy) -> Circle | None:
    """The ring of a strategy; None where its variant has none."""
    for inside, around in shape.rings.get(strategy.variant, ()) if strategy.variant else ():
        axes = strategy.split[around]
        if axes and axes[-1] in strategy.split[inside]:
            return Circle(axes[-1], inside, around)
    return None


def can_circle(shape: Shape, variant: Variant, split: Axes) -> bool:
    """Whether one axis splits two factors that the variant has as a pair, and each other axis one."""
    counted = Counter(axis_of(axis) for axes in split for axis in axes)
    twice = [axis for axis, times in counted.items() if times > 1]
    return (
        len(twice) == 1
        and counted[twice[0]] == 2
        and any(
            split[around][-1:] == (twice[0],) and twice[0] in split[inside]
            for inside, around in shape.rings[variant.name]
        )
        and not any(map(is_folded, split))
    )


def split_in_ring(circle: Circle, split: Axes, carried: Collection[int]) -> Axes:
    """The split of a tensor or product with the factors `carried`: one with both factors of the ring is split along
    what stays."""
    if circle.inside not in carried or circle.around not in carried:
        return split
    return tuple(axes[:-1] if i == circle.around else axes for i, axes in enumerate(split))


def part_of_ring(shape: Shape, strategy: Strategy, circle: Circle, mesh: Mesh) -> tuple[str, Part, int]:
    """What the body of a ring is told: the factor that goes round, the part of its local dim that the rank has, and
    how often such a part repeats in the dim (the product of the atoms before it)."""
    around = shape.factors[circle.around]
    local = [
        (f.index, mesh.chunk(f.size, axes[:-1] if i == circle.around else axes))
        for i, (f, axes) in enumerate(zip(shape.factors, strategy.split, strict=True))
        if f.name == around.name
    ]
    outer = math.prod(size for index, size in local if index < around.index)
    unit = math.prod(size for index, size in local if index > around.index)
    here = next(size for index, size in local if index == around.index)
    return around.name, Part((circle.axis,), here * unit, unit), outer


def travelling(shape: Shape, strategy: Strategy) -> Side:
    """What goes round: an operand, or the result."""
    variant = shape.variant_of(strategy)
    assert variant is not None and variant.ring is not None
    return shape.results[0] if variant.ring.operand is None else shape.operands[variant.ring.operand]


def sliced(shape: Shape, circle: Circle) -> Side:
    """The operand or result that every step reads or writes a slice of: it has both factors of the ring."""
    sides = (*shape.operands, *shape.results)
    return next(side for side in sides if {circle.inside, circle.around} <= side.carried)


def adds_up(shape: Shape, circle: Circle) -> bool:
    """Whether steps make addends of one sum: all but a ring in which each step makes rows or columns of the result."""
    return not {circle.inside, circle.around} <= shape.results[0].carried


def workspace_of_ring(shape: Shape, strategy: Strategy, circle: Circle, mesh: Mesh) -> int:
    """Bytes that the body of a ring allocates and frees again: what is sent and what comes, with more than two ranks;
    a product that is added or copied; a slice that is no block of memory; and, of 16 bits, a sum of products in 32."""
    chunks = [mesh.chunk(f.size, axes) for f, axes in zip(shape.factors, strategy.split, strict=True)]

    def local(side: Side) -> int:
        return math.prod(1 if f is None else chunks[f] for f in side.factors) * side.itemsize

    going, made, slice_of = travelling(shape, strategy), shape.results[0], sliced(shape, circle)
    *_, outer = part_of_ring(shape, strategy, circle, mesh)
    several = 1 if mesh.sizes[circle.axis] == 2 else 2
    needed = (2 if going is made else several) * local(going)
    if slice_of is made:
        return needed + (local(made) if outer > 1 else 0)
    if going is not made and shape.dtype in LOW:
        needed += local(made) * (4 // made.itemsize)  # the result is not there yet, but a product of its size
    return needed + (local(slice_of) if outer > 1 else 0)
