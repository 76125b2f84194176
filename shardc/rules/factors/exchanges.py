"""Variants that exchange the parts of two factors: one axis splits experts and tokens, and tokens travel.

t d, e f d -> t d  on dp=2,ep=4    ep splits e and t, dp splits t:  demands [t@(dp,ep), d] and [e@ep, f, d],
                                                                    makes [t@(dp,ep), d], complete over ep
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from shardc.ir.mesh import Mesh
from shardc.rules.notation import RowBound, Variant

if TYPE_CHECKING:
    from shardc.rules.factors.strategy import Shape, Strategy

Axes = tuple[tuple[str, ...], ...]


def exchanges_of(shape: Shape) -> dict[str, tuple[int, tuple[int, ...]]]:
    """For each variant that exchanges two factors: the first, and the atoms of the second."""
    free = [(i, factor) for i, factor in enumerate(shape.factors) if not factor.whole]
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    for variant in shape.variants:
        if variant.exchange is not None:
            first, second = variant.exchange
            firsts = [i for i, factor in free if factor.name == first and factor.index == 0]
            seconds = tuple(i for i, factor in free if factor.name == second)
            if firsts and seconds:
                found[variant.name] = firsts[0], seconds
    return found


def exchanged(shape: Shape, strategy: Strategy) -> tuple[str, ...]:
    """The axes over which a strategy exchanges."""
    pair = shape.exchanges.get(strategy.variant)
    return strategy.split[pair[0]] if pair else ()


def can_exchange(shape: Shape, variant: Variant, split: Axes) -> bool:
    """Whether every axis of the first factor splits the second too, and no other axis splits two."""
    if variant.name not in shape.exchanges:
        return False
    first, seconds = shape.exchanges[variant.name]
    both, rest = set(split[first]), [axis for i, axes in enumerate(split) if i != first for axis in axes]
    return bool(both) and both <= {axis for i in seconds for axis in split[i]} and len(rest) == len(set(rest))


def split_by_second(shape: Shape, strategy: Strategy, carried: Collection[int]) -> Axes:
    """The split of a product with the factors `carried`: one with both is split along the second."""
    pair = shape.exchanges.get(strategy.variant)
    if pair is None or pair[0] not in carried or not set(carried) & set(pair[1]):
        return strategy.split
    return tuple(() if i == pair[0] else axes for i, axes in enumerate(strategy.split))


def rows_at_most(bound: RowBound, own: int, here: int, senders: int) -> int:
    """The rows for which there is room at `here` local points of factor `to`, from `senders` ranks with `own` points of
    `of` each."""
    sent = own * senders
    return min(sent * min(bound.each, here), math.ceil(bound.capacity * sent * bound.each * here / bound.total))


def senders(shape: Shape, strategy: Strategy, mesh: Mesh) -> int:
    """The ranks that send rows to one: those it exchanges with, and itself."""
    return mesh.ways(exchanged(shape, strategy))


def part_of(product: str) -> float:
    """The part of a product's points that counts: 0.25 of `2/8 t e d`."""
    over, slash, under = product.split()[0].partition("/")
    return int(over) / int(under) if slash else 1.0
