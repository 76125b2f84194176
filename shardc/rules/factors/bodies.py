"""What an operator computes and sends under a strategy: flops, bytes that are read and written, collectives.

mm [m, k] x [k, n]                 tp splits k: 2 m k n / tp flops, nothing sent
ring attention, two ranks          step 0: the rank's own keys, while the next ones come; step 1: those
mm in a ring, two ranks            step 0: the rows that the rank has, while the next ones come; step 1: those
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from shardc.ir.mesh import Mesh
from shardc.rules.factors.foldable import is_worth_folding
from shardc.rules.factors.rings import Circle, adds_up, circle_of, part_of_ring, sliced, travelling
from shardc.rules.factors.strategy import Shape, Side, Strategy, masks, split_of
from shardc.rules.notation import Band, Send, Travel, Variant
from shardc.runtime.collectives.collective import AnyCollective
from shardc.runtime.collectives.permute import permute
from shardc.runtime.mesh.bands import Runs, Visit, hop, pairs, runs_of_parts, visits
from shardc.runtime.mesh.orders import FOLDED, axis_of, in_order


class Sent(NamedTuple):
    """A collective, its axis, and the bytes of its local operand; in a ring also `by` how many ranks it goes on."""

    collective: AnyCollective
    axis: str
    size: float
    by: int = 0


class BodyStep(NamedTuple):
    """One step of what runs for an operator: the part (0 to 1) of its flops, the bytes that a second kernel reads and
    writes, and the collectives `before`, `beside` and `after` what is computed (see `shardc.cost.clock.TimedStep`)."""

    part: float
    copied: int = 0
    before: tuple[Sent, ...] = ()
    beside: tuple[Sent, ...] = ()
    after: tuple[Sent, ...] = ()


def steps(shape: Shape, strategy: Strategy, mesh: Mesh) -> tuple[BodyStep, ...]:
    """The steps of an operator: one, but for a ring."""
    variant, circle = shape.variant_of(strategy), circle_of(shape, strategy)
    if circle is not None:
        return tuple(_circling(shape, strategy, circle, mesh))
    once = tuple(_once(shape, strategy, variant, mesh)) if variant else ()
    ring = _ring(shape, strategy, mesh)
    if ring is None or variant is None:
        return (BodyStep(1.0, after=once),)
    axes, visited = ring
    counts = [mesh.sizes[axis] for axis in axes]
    hops = [hop(one.offset, other.offset, counts) for one, other in itertools.pairwise(visited)]
    home = hop(visited[-1].offset, visited[0].offset, counts)
    total = sum(visit.pairs for visit in visited)
    made: list[BodyStep] = []
    moving = [(send, _size(shape, strategy, send, mesh)) for send in _travelling(variant)]
    for place, visit in enumerate(visited):
        before, beside, after = list[Sent](), list[Sent](), list[Sent]()
        for send, size in moving:
            returns = send.travel is Travel.HOME
            along = [Sent(send.collective, axes[axis], size, by) for axis, by in _hop_beside(hops, place - returns)]
            before += along[:-1]  # on its way it can wait at one rank only
            beside += along[-1:]
            if returns and place == len(visited) - 1:
                after += [Sent(send.collective, axes[axis], size, by) for axis, by in home]
        part = visit.pairs / total if total else 1.0 / len(visited)
        made.append(BodyStep(part, before=tuple(before), beside=tuple(beside), after=tuple(after)))
    return (*made[:-1], made[-1]._replace(after=(*made[-1].after, *once)))


def _circling(shape: Shape, strategy: Strategy, circle: Circle, mesh: Mesh) -> Iterator[BodyStep]:
    """The steps of a ring in which every rank meets every part. An operand is sent on before a step uses it, a sum
    after a step has added to it."""
    chunks = [mesh.chunk(f.size, axes) for f, axes in zip(shape.factors, strategy.split, strict=True)]
    count, outer = mesh.sizes[circle.axis], part_of_ring(shape, strategy, circle, mesh)[2]
    side, result = travelling(shape, strategy), shape.results[0]
    sent = Sent(permute, circle.axis, side.itemsize * _local(shape, side, chunks), 1)
    slice_of = sliced(shape, circle)
    cut = 2 * slice_of.itemsize * _local(shape, slice_of, chunks) if outer > 1 else 0
    added = 3 * result.itemsize * _local(shape, result, chunks) if adds_up(shape, circle) else 0
    for step in range(count):
        beside = step > 0 if side is result else step + 1 < count
        yield BodyStep(1 / count, cut + (added if step else 0), beside=(sent,) if beside else ())


def _hop_beside(hops: list[list[tuple[int, int]]], place: int) -> list[tuple[int, int]]:
    return hops[place] if 0 <= place < len(hops) else []


def sends(shape: Shape, strategy: Strategy, mesh: Mesh) -> Iterator[Sent]:
    """The collectives in the body of a strategy's variant, each with its axis and the bytes of its local operand."""
    for step in steps(shape, strategy, mesh):
        yield from (*step.before, *step.beside, *step.after)


def is_ring(shape: Shape, strategy: Strategy) -> bool:
    """Whether the body of a strategy's variant computes in steps, beside which it sends."""
    variant = shape.variant_of(strategy)
    return variant is not None and (variant.ring is not None or any(True for _ in _travelling(variant)))


def imbalance(shape: Shape, strategy: Strategy) -> float:
    """How much more the slowest rank does than the mean."""
    variant = shape.variant_of(strategy)
    return 1.0 if variant is None else variant.imbalance


def _travelling(variant: Variant) -> Iterator[Send]:
    return (send for several in variant.sends.values() for send in several if send.travel is not Travel.ONCE)


def _once(shape: Shape, strategy: Strategy, variant: Variant, mesh: Mesh) -> Iterator[Sent]:
    split = {f.name for f, axes in zip(shape.factors, strategy.split, strict=True) if axes}
    for factor, axes in zip(shape.factors, strategy.split, strict=True):
        for send in variant.sends.get(factor.name, ()) if factor.parting and axes else ():
            if send.travel is not Travel.ONCE or send.parts not in (None, mesh.ways(axes)):
                continue
            if not split.issuperset(send.beside):
                continue
            size = _size(shape, strategy, send, mesh)
            for axis in map(axis_of, reversed(axes)):
                yield Sent(send.collective, axis, size)
                size = send.collective.result_bytes(mesh.sizes[axis], size)


def _size(shape: Shape, strategy: Strategy, send: Send, mesh: Mesh) -> float:
    """Bytes of the local operand of a body's collective."""
    pairs_of = zip(shape.factors, strategy.split, strict=True)
    local = math.prod(mesh.chunk(f.size, axes) for f, axes in pairs_of if f.name in send.factors)
    return local * send.itemsize * send.elements


def _ring(shape: Shape, strategy: Strategy, mesh: Mesh) -> tuple[tuple[str, ...], tuple[Visit, ...]] | None:
    """The axes of a ring, and its steps; None where the strategy's variant is none."""
    band = shape.band
    if band is None or not is_ring(shape, strategy):
        return None
    axes, rows = _runs(shape, strategy, band, band.rows, mesh)
    columns = _runs(shape, strategy, band, band.columns, mesh)[1]
    return axes, visits(rows, columns, tuple([mesh.sizes[axis] for axis in axes]), band.causal, band.window)


def _runs(
    shape: Shape, strategy: Strategy, band: Band, name: str, mesh: Mesh
) -> tuple[tuple[str, ...], tuple[Runs, ...]]:
    """The mesh axes that split a factor, and the positions of every part of it. A factor that is missing has size
    one."""
    atoms = [(f.size, axes) for f, axes in zip(shape.factors, strategy.split, strict=True) if f.name == name]
    size = math.prod(size for size, _ in atoms)
    axes = atoms[0][1] if atoms else ()
    unit = size // atoms[0][0] if atoms else 1
    if band.balanced and len(axes) == 1 and is_worth_folding(size // unit, mesh.ranks[axes[0]]):
        axes = (in_order(axis_of(axes[0]), FOLDED),)
    counts = tuple([mesh.ranks[axis] for axis in axes])
    return tuple(map(axis_of, axes)), runs_of_parts(size, axes, counts, unit)


def _computed(shape: Shape, strategy: Strategy, band: Band, mesh: Mesh) -> int:
    """The pairs of a band that the rank computes that has most of them."""
    ring = _ring(shape, strategy, mesh)
    if ring is not None:
        return sum(visit.pairs for visit in ring[1])
    rows, columns = (_runs(shape, strategy, band, name, mesh)[1] for name in (band.rows, band.columns))
    return max(pairs(one, other, band.causal, band.window) for one in rows for other in columns)


def work(shape: Shape, strategy: Strategy, mesh: Mesh) -> tuple[float, float]:
    """The flops that a rank computes for an operator, and the bytes that it reads and writes.

    A product counts two flops for every point of its factors; of a band, for its pairs. Padding and masks count. The
    bytes of a ring are those of each step.
    """

    every = [mesh.chunk(f.size, axes) for f, axes in zip(shape.factors, strategy.split, strict=True)]
    together = shape.groups.get(strategy.variant) or strategy.variant in shape.exchanges

    def chunks(carried: Collection[int]) -> list[int]:
        if not together:
            return every
        split = split_of(shape, strategy, carried)
        return [mesh.chunk(f.size, axes) for f, axes in zip(shape.factors, split, strict=True)]

    results = shape.results if shape.fused.writes else ()
    moved = sum([side.itemsize * _local(shape, side, chunks(side.carried)) for side in results])
    if shape.drawn is not None:
        moved += shape.drawn.itemsize * drawn(shape, strategy, mesh)
    for operand, side in enumerate(shape.operands):
        passes = 1 + 2 * len(masks(shape, strategy, operand, mesh)) if shape.filled[operand] else 1
        passes -= 0 if shape.fused.read(operand) else 1
        moved += side.itemsize * _local(shape, side, chunks(side.carried)) * passes
    circle = circle_of(shape, strategy)
    rounds = 1 if circle is None else mesh.sizes[circle.axis]
    return rounds * _flops(shape, strategy, mesh, chunks), moved


def drawn(shape: Shape, strategy: Strategy, mesh: Mesh) -> float:
    """The random numbers that a rank draws for an operator."""
    if shape.drawn is None:
        return 0.0
    local = (mesh.chunk(f.size, axes) for f, axes in zip(shape.factors, strategy.split, strict=True)
             if f.name in shape.drawn.factors)  # fmt: skip
    return float(shape.drawn.each * math.prod(local))


def _flops(shape: Shape, strategy: Strategy, mesh: Mesh, chunks: Callable[[Collection[int]], list[int]]) -> float:
    flops, band = 0.0, shape.band
    sides = frozenset[str]() if band is None else {band.rows, band.columns}
    for text, (part, product) in zip(shape.flops, shape.products, strict=True):
        local, rest, points = chunks(product), product, 1
        if band is not None and sides.issubset(text.split()):
            rest = tuple(i for i in product if shape.factors[i].name not in sides)
            points = _computed(shape, strategy, band, mesh)
        flops += 2 * part * points * math.prod([local[i] for i in rest])
    return flops


def _local(shape: Shape, side: Side, chunks: list[int]) -> int:
    """Elements of an operand or result that a rank reads or writes. An expanded dim is read once."""
    elements = 1
    for size, factor in zip(side.sizes, side.factors, strict=True):
        # the factor of a window has a size that divides the dim's
        elements *= size if factor is None else size // max(shape.factors[factor].size, 1) * chunks[factor]
    return elements
