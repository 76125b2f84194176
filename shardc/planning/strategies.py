"""Every strategy of an operator, with the layouts that it demands and makes, and its seconds.

    mm [m, k] x [k, n]  on dp=2,tp=2    dp splits m, tp splits n:  demands [m@dp, k] and [k, n@tp], makes [m@dp, n@tp]
                                        tp splits k:               demands [m, k@tp] and [k@tp, n], makes +sum@tp
                                        ...

The options of an operator depend on its `Shape` only, so all operators of one shape share them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from shardc.analysis.bodies import Body, body_of
from shardc.cost.conversion import TensorClass
from shardc.cost.hardware import Hardware
from shardc.ir.mesh import Mesh
from shardc.ir.splits import Splits
from shardc.rules.factors.bodies import drawn, imbalance, is_ring, work
from shardc.rules.factors.rings import circle_of
from shardc.rules.factors.strategy import (
    Shape,
    Strategy,
    demand,
    make,
    one_reduction,
    splittable,
    variants_of,
)
from shardc.runtime.mesh.orders import BLOCKS, FOLDED, in_order

QUICK = 64
"""How many plain strategies, those of least compute, a ring is compared with before it is compared with all."""


@dataclass(eq=False)
class Strategies:
    """Every strategy of one shape on one mesh, and what depends on neither device nor the rest of the program."""

    shape: Shape
    mesh: Mesh
    strategies: list[Strategy]
    """Those whose results are partial under one reduction at most."""

    @cached_property
    def demanded(self) -> list[list[Splits]]:
        """Per operand the layout that each strategy demands."""
        operands = range(len(self.shape.operands))
        return [[demand(self.shape, s, k, self.mesh) for s in self.strategies] for k in operands]

    @cached_property
    def made(self) -> list[list[Splits]]:
        """Per result the layout that each strategy makes."""
        results = range(len(self.shape.results))
        return [[make(self.shape, s, k, self.mesh) for s in self.strategies] for k in results]

    @cached_property
    def work(self) -> tuple[np.ndarray, np.ndarray]:
        """Flops and bytes that a rank computes and moves, one entry a strategy."""
        flops, moved = np.array([work(self.shape, s, self.mesh) for s in self.strategies]).reshape(-1, 2).T
        return flops, moved

    @cached_property
    def bodies(self) -> list[int]:
        """The numbers of the strategies whose bodies go round a ring, or are uneven."""
        return [
            place
            for place, strategy in enumerate(self.strategies)
            if is_ring(self.shape, strategy) or imbalance(self.shape, strategy) != 1.0
        ]


@lru_cache(maxsize=512)
def strategies_of(shape: Shape, mesh: Mesh) -> Strategies:
    """All strategies of a shape but those of rings over factors that are not parted; compilations of whatever program
    share them."""
    return Strategies(shape, mesh, [s for s in _enumerate(shape, mesh) if one_reduction(shape, s, mesh)])


@lru_cache(maxsize=512)
def rings_of(shape: Shape, mesh: Mesh, along: tuple[str, ...], variants: frozenset[str]) -> Strategies:
    """The strategies of a shape in which something goes round one of the axes `along`, by one of some variants, and all
    other axes split a factor. Axes of one factor are in the mesh's order, but that the axis of the ring may be last."""
    return Strategies(shape, mesh, [s for axis in along for s in _rings(shape, mesh, axis, variants)])


def together(one: Strategies, other: Strategies, places: list[int]) -> Strategies:
    """The strategies of one, and those of the other at some places."""
    made = Strategies(one.shape, one.mesh, [*one.strategies, *(other.strategies[place] for place in places)])
    for known, more, name in ((one.demanded, other.demanded, "demanded"), (one.made, other.made, "made")):
        lists = [[*first, *(rest[place] for place in places)] for first, rest in zip(known, more, strict=True)]
        vars(made)[name] = lists
    return made


@dataclass(eq=False)
class OperatorOptions:
    """Every strategy of one shape, the layouts each demands and makes, and its seconds of compute."""

    shape: Shape
    mesh: Mesh
    device: Hardware
    operand_classes: list[TensorClass]
    result_classes: list[TensorClass]
    offered: frozenset[str]
    """The variants with rings that may be among the strategies."""

    def __post_init__(self) -> None:
        self._known = strategies_of(self.shape, self.mesh)
        along = self.device.hiding(self.mesh) if self.offered else ()
        if along:
            rings = rings_of(self.shape, self.mesh, along, self.offered)
            self._known = together(self._known, rings, self._faster(rings))

    def _faster(self, rings: Strategies) -> list[int]:
        """The places of the rings that take less time than every strategy without one, even if that first converts what
        lies as the ring demands it, and then what it makes to what the ring makes. No plan is faster with the others.
        """
        if not rings.strategies:
            return []
        taken = self.device.compute_seconds_each(*self._known.work, self.shape.dtype, self.shape.fused.launches)
        sending, possible = self._sending_least(rings), np.arange(len(rings.strategies))
        for others in (np.argsort(taken, kind="stable")[:QUICK], np.arange(len(taken))):  # the first rule most out
            least = self._least_instead(rings, possible, taken, others)
            less = sending[possible] < least  # before the rest, which costs more to ask
            for number in np.flatnonzero(less):
                less[number] = self._takes_less(rings.strategies[possible[number]], least[number])
            possible = possible[less]
        return possible.tolist()

    def _least_instead(
        self, rings: Strategies, places: np.ndarray, taken: np.ndarray, others: np.ndarray
    ) -> np.ndarray:
        """For the rings at `places`, the least seconds of the plain strategies `others` with conversions around them.
        `taken` are the seconds of every plain strategy alone."""
        plain = self._known
        instead = np.broadcast_to(taken[others], (len(places), len(others))).copy()
        for classes, ours, theirs, made in (
            (self.operand_classes, rings.demanded, plain.demanded, False),
            (self.result_classes, rings.made, plain.made, True),
        ):
            ring, other = _indices(classes, ours), _indices(classes, theirs)
            for tensor, here, there in zip(classes, ring, other, strict=True):
                seconds = tensor.seconds.T if made else tensor.seconds
                instead += seconds[np.ix_(here[places], there[others])]
        return instead.min(axis=1)

    def _sending_least(self, rings: Strategies) -> np.ndarray:
        """Seconds that the collectives of each ring take alone: it takes no less."""
        seconds: list[float] = []
        for place, strategy in enumerate(rings.strategies):
            circle, variant = circle_of(self.shape, strategy), self.shape.variant_of(strategy)
            assert circle is not None and variant is not None and variant.ring is not None
            if variant.ring.operand is None:
                size = self.result_classes[0].local_bytes(rings.made[0][place])
            else:
                goes = variant.ring.operand
                size = self.operand_classes[goes].local_bytes(rings.demanded[goes][place])
            steps = self.mesh.sizes[circle.axis] - 1
            seconds.append(steps * self.device.passing_seconds(size, self.mesh, circle.axis, 1))
        return np.array(seconds)

    def _takes_less(self, strategy: Strategy, seconds: float) -> bool:
        body = self._body(strategy)
        return max(body.compute, body.sending) < seconds and body.compute + body.exposed < seconds

    @cached_property
    def rings(self) -> list[int]:
        """The places of the strategies in which something goes round though no factor is parted."""
        return [place for place, one in enumerate(self.strategies) if one.variant in self.shape.rings]

    @property
    def strategies(self) -> list[Strategy]:
        """All strategies of the shape whose results are partial under one reduction at most."""
        return self._known.strategies

    @cached_property
    def operand_layouts(self) -> list[np.ndarray]:
        """Per operand, the index of the demanded layout in its class, one entry a strategy."""
        return _indices(self.operand_classes, self._known.demanded)

    @cached_property
    def result_layouts(self) -> list[np.ndarray]:
        """Per result, the index of the layout made, one entry a strategy."""
        return _indices(self.result_classes, self._known.made)

    @cached_property
    def seconds(self) -> np.ndarray:
        """Seconds of each strategy: compute, and the collectives inside its body."""
        if all(factor.parting is None for factor in self.shape.factors):
            seconds = self.compute.copy()
            for place in self._known.bodies:
                seconds[place] += self.sending(self.strategies[place])
            return seconds
        return self.compute + np.array([self.sending(s) for s in self.strategies])

    def sending(self, strategy: Strategy) -> float:
        """Seconds of the collectives inside the body of one strategy that nothing hides which it computes itself."""
        return self._body(strategy).exposed

    @cached_property
    def compute(self) -> np.ndarray:
        """Compute seconds of each strategy. An operator without operands still takes the time to write its result."""
        if not self.shape.computes:
            return np.zeros(len(self.strategies))
        seconds = self.device.compute_seconds_each(*self._known.work, self.shape.dtype, self.shape.fused.launches)
        if self.shape.drawn is not None:
            numbers = np.array([drawn(self.shape, strategy, self.mesh) for strategy in self.strategies])
            seconds += numbers / (self.device.stream if self.shape.drawn.stream else self.device.draws)
        for place in self._known.bodies:
            seconds[place] = self._body(self.strategies[place]).compute
        return seconds

    @cached_property
    def least(self) -> float:
        """The compute seconds of the strategy that has least."""
        return float(self.compute.min())

    def compute_of(self, strategy: Strategy) -> float:
        """Compute seconds of one strategy."""
        return self._body(strategy).compute

    def _body(self, strategy: Strategy) -> Body:
        if strategy not in self._bodies:
            self._bodies[strategy] = body_of(self.shape, strategy, self.mesh, self.device)
        return self._bodies[strategy]

    @cached_property
    def _bodies(self) -> dict[Strategy, Body]:
        return {}


def _indices(classes: list[TensorClass], layouts: list[list[Splits]]) -> list[np.ndarray]:
    """Per operand or result, the layouts by their index in its class."""
    return [
        np.array([one.index[splits] for splits in of_one], dtype=np.intp)
        for one, of_one in zip(classes, layouts, strict=True)
    ]


class _Splitting(NamedTuple):
    """What an axis splits: these factors together, in one order."""

    factors: tuple[int, ...] = ()
    order: str = BLOCKS


def _enumerate(shape: Shape, mesh: Mesh) -> Iterator[Strategy]:
    """One strategy for every split and every variant that runs it, but for rings over factors that are not parted."""
    free = [(i,) for i, factor in enumerate(shape.factors) if not factor.whole]
    plain = [_Splitting(together) for together in ((), *free, *shape.bundles)]
    folded = [
        _Splitting(together, FOLDED) for together in (*free, *shape.bundles)
        if all(shape.factors[i].folds for i in together)
    ]  # fmt: skip
    choices = [*plain, *range(len(shape.linear)), *folded]
    options: list[list[_Splitting | int]] = [choices if ways > 1 else [_Splitting()] for _, ways in mesh.axes]
    # an int: the axis's partial sums pass through this linear group

    @cache
    def variants(split: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
        return variants_of(shape, split)

    for passes, axes_of in _allowed(shape, mesh, options):
        orders = [itertools.permutations(axes_of[i]) if i in axes_of else ((),) for i in range(len(shape.factors))]
        for order in itertools.product(*orders):
            for variant in variants(order):
                yield Strategy(order, passes, variant=variant)


def _rings(shape: Shape, mesh: Mesh, round_axis: str, offered: frozenset[str]) -> Iterator[Strategy]:
    """The strategies of some variants in which something goes round an axis."""
    pairs = {tuple(sorted(pair)) for name in offered for pair in shape.rings[name]}
    splits_one: list[_Splitting | int] = [
        _Splitting((i,)) for i, factor in enumerate(shape.factors) if not factor.whole
    ]
    options: list[list[_Splitting | int]] = [
        [_Splitting(pair) for pair in sorted(pairs)] if name == round_axis
        else splits_one if ways > 1 else [_Splitting()]
        for name, ways in mesh.axes
    ]  # fmt: skip

    def orders(axes: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
        last = *(axis for axis in axes if axis != round_axis), round_axis
        return dict.fromkeys((axes, last)) if round_axis in axes else (axes,)

    for passes, axes_of in _allowed(shape, mesh, options):
        for order in itertools.product(*(orders(axes_of.get(i, ())) for i in range(len(shape.factors)))):
            for variant in variants_of(shape, order):
                if variant in offered:
                    yield Strategy(order, passes, variant=variant)


def _allowed(
    shape: Shape, mesh: Mesh, options: list[list[_Splitting | int]]
) -> Iterator[tuple[tuple[tuple[str, int], ...], dict[int, tuple[str, ...]]]]:
    """For every choice of one option an axis that the shape allows: the axes whose partial sums pass through a linear
    group, and by factor the axes that split it, in the mesh's order."""

    @cache
    def splits(factor: int, axes: tuple[str, ...]) -> bool:
        return splittable(shape, factor, axes, mesh)

    for choice in itertools.product(*options):
        axes_of: dict[int, tuple[str, ...]] = {}
        for axis, c in zip(mesh.names, choice, strict=True):
            if isinstance(c, _Splitting):
                for factor in c.factors:
                    axes_of[factor] = (*axes_of.get(factor, ()), in_order(axis, c.order))
        if all(splits(factor, axes) for factor, axes in axes_of.items()):
            yield tuple((a, c) for a, c in zip(mesh.names, choice, strict=True) if isinstance(c, int)), axes_of
