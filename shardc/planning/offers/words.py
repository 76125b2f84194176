"""Strategies by what every mesh axis does: a word has one letter an axis.

mm on dp=2,tp=2     word: dp splits m, tp splits n     strategy: split (m: dp) (k: ) (n: tp)
                    word: both split m                 strategies: m by dp, tp; m by tp, dp
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

from shardc.ir.mesh import Mesh
from shardc.rules.factors.strategy import Shape, Strategy, splittable, variants_of
from shardc.runtime.mesh.orders import BLOCKS, FOLDED, axis_of, in_order, order_of


class Splitting(NamedTuple):
    """What an axis splits: these factors together, in one order."""

    factors: tuple[int, ...] = ()
    order: str = BLOCKS


Letter = Splitting | int
"""What one axis does. A number: its partial sums pass through that linear group."""
Word = tuple[Letter, ...]
Orders = Callable[[int, tuple[str, ...]], Iterable[tuple[str, ...]]]
"""The orders in which a factor may be split by some axes, which are given in the mesh's order."""
NOTHING = Splitting()


def letters(shape: Shape, mesh: Mesh) -> list[list[Letter]]:
    """Per axis of the mesh, everything that it may do."""
    free = [(i,) for i, factor in enumerate(shape.factors) if not factor.whole]
    plain = [Splitting(together) for together in ((), *free, *shape.bundles)]
    folded = [
        Splitting(together, FOLDED) for together in (*free, *shape.bundles)
        if all(shape.factors[i].folds for i in together)
    ]  # fmt: skip
    every = [*plain, *range(len(shape.linear)), *folded]
    return [every if ways > 1 else [NOTHING] for _, ways in mesh.axes]


def every_order(_: int, axes: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    """The axes in all orders."""
    return itertools.permutations(axes)


def written(shape: Shape, mesh: Mesh, words: Iterable[Word], orders: Orders = every_order) -> Iterator[Strategy]:
    """One strategy for every word, every order and every variant that runs it, but for rings over factors that are not
    parted."""

    @cache
    def variants(split: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
        return variants_of(shape, split)

    for passes, axes_of in _allowed(shape, mesh, words):
        ordered = [orders(i, axes_of[i]) if i in axes_of else ((),) for i in range(len(shape.factors))]
        for order in itertools.product(*ordered):
            for variant in variants(order):
                yield Strategy(order, passes, variant=variant)


def rings(
    shape: Shape, mesh: Mesh, round_axis: str, offered: frozenset[str], words: Iterable[Word]
) -> Iterator[Strategy]:
    """The strategies of some variants in which something goes round an axis, for words that have a pair there. Axes of
    one factor are in the mesh's order, but that the axis of the ring may be last."""

    def orders(axes: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
        last = *(axis for axis in axes if axis != round_axis), round_axis
        return dict.fromkeys((axes, last)) if round_axis in axes else (axes,)

    for passes, axes_of in _allowed(shape, mesh, words):
        for order in itertools.product(*(orders(axes_of.get(i, ())) for i in range(len(shape.factors)))):
            for variant in variants_of(shape, order):
                if variant in offered:
                    yield Strategy(order, passes, variant=variant)


def ring_letters(shape: Shape, mesh: Mesh, round_axis: str, offered: frozenset[str]) -> list[list[Letter]]:
    """Per axis what it may do in a ring round one of them: every other splits a factor."""
    pairs = {tuple(sorted(pair)) for name in offered for pair in shape.rings[name]}
    splits_one: list[Letter] = [Splitting((i,)) for i, factor in enumerate(shape.factors) if not factor.whole]
    return [
        [Splitting(pair) for pair in sorted(pairs)] if name == round_axis
        else splits_one if ways > 1 else [NOTHING]
        for name, ways in mesh.axes
    ]  # fmt: skip


def word_of(strategy: Strategy, mesh: Mesh) -> Word:
    """What every axis does in a strategy."""
    passes = dict[str, Letter](strategy.passes)
    factors: dict[str, tuple[int, ...]] = {}
    order: dict[str, str] = {}
    for i, axes in enumerate(strategy.split):
        for axis in axes:
            factors[axis_of(axis)] = (*factors.get(axis_of(axis), ()), i)
            order[axis_of(axis)] = order_of(axis)
    return tuple(
        Splitting(factors[axis], order[axis]) if axis in factors else passes.get(axis, NOTHING) for axis in mesh.names
    )


def beside(word: Word, options: Sequence[Sequence[Letter]]) -> Iterator[Word]:
    """A word; those in which a set of axes does one other thing together; and those in which two axes change places."""
    yield word
    places = [i for i, several in enumerate(options) if len(several) > 1]
    for count in range(1, len(places) + 1):
        for some in itertools.combinations(places, count):
            for letter in options[some[0]]:
                yield tuple(letter if i in some else other for i, other in enumerate(word))
    for one, other in itertools.combinations(places, 2):
        turned = [*word]
        turned[one], turned[other] = word[other], word[one]
        yield tuple(turned)


def _allowed(
    shape: Shape, mesh: Mesh, words: Iterable[Word]
) -> Iterator[tuple[tuple[tuple[str, int], ...], dict[int, tuple[str, ...]]]]:
    """For every word that the shape allows: the axes whose partial sums pass through a linear group, and by factor the
    axes that split it, in the mesh's order."""

    @cache
    def splits(factor: int, axes: tuple[str, ...]) -> bool:
        return splittable(shape, factor, axes, mesh)

    for word in words:
        axes_of: dict[int, tuple[str, ...]] = {}
        for axis, letter in zip(mesh.names, word, strict=True):
            if isinstance(letter, Splitting):
                for factor in letter.factors:
                    axes_of[factor] = (*axes_of.get(factor, ()), in_order(axis, letter.order))
        if all(splits(factor, axes) for factor, axes in axes_of.items()):
            yield tuple((a, c) for a, c in zip(mesh.names, word, strict=True) if isinstance(c, int)), axes_of
