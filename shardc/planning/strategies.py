"""Every strategy of an operator, with the layouts that it demands and makes, and its seconds.

    mm [m, k] x [k, n]  on dp=2,tp=2    dp splits m, tp splits n:  demands [m@dp, k] and [k, n@tp], makes [m@dp, n@tp]
                                        tp splits k:               demands [m, k@tp] and [k@tp, n], makes +sum@tp
                                        ...

The options of an operator depend on its `Shape` only, so all operators of one shape share them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from shardc.analysis.bodies import Body, body_of
from shardc.cost.conversion import TensorClass
from shardc.cost.hardware import Hardware
from shardc.ir.mesh import Mesh
from shardc.ir.splits import Splits
from shardc.planning.offers import words
from shardc.rules.factors.bodies import drawn, imbalance, is_ring, work
from shardc.rules.factors.rings import circle_of
from shardc.rules.factors.strategy import (
    Shape,
    Strategy,
    demand,
    make,
    one_reduction,
)

if TYPE_CHECKING:
    from shardc.planning.offers.near import Offers

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
    every = words.written(shape, mesh, itertools.product(*words.letters(shape, mesh)))
    return Strategies(shape, mesh, [s for s in every if one_reduction(shape, s, mesh)])


@lru_cache(maxsize=512)
def rings_of(shape: Shape, mesh: Mesh, along: tuple[str, ...], variants: frozenset[str]) -> Strategies:
    """The strategies of a shape in which something goes round one of the axes `along`, by one of some variants, and all
    other axes split a factor. Axes of one factor are in the mesh's order, but that the axis of the ring may be last."""

    def listed(axis: str) -> Iterator[Strategy]:
        every = itertools.product(*words.ring_letters(shape, mesh, axis, variants))
        return words.rings(shape, mesh, axis, variants, every)

    return Strategies(shape, mesh, [s for axis in along for s in listed(axis)])


def together(one: Strategies, other: Strategies, places: list[int]) -> Strategies:
    """The strategies of one, and those of the other at some places."""
    made = Strategies(one.shape, one.mesh, [*one.strategies, *(other.strategies[place] for place in places)])
    for known, more, name in ((one.demanded, other.demanded, "demanded"), (one.made, other.made, "made")):
        lists = [[*first, *(rest[place] for place in places)] for first, rest in zip(known, more, strict=True)]
        vars(made)[name] = lists
    return made


@dataclass(eq=False)
class OperatorOptions:
    """Every strategy of one shape, the layouts each demands and makes, and its seconds of compute. With `offers`, those
    of them that are near `middle`."""

    shape: Shape
    mesh: Mesh
    device: Hardware
    operand_classes: list[TensorClass]
    result_classes: list[TensorClass]
    offered: frozenset[str]
    """The variants with rings that may be among the strategies."""

    offers: Offers | None = None
    middle: Strategy | None = None

    @cached_property
    def _plain(self) -> Strategies:
        return self.offers.strategies(self.shape, self.middle) if self.offers else strategies_of(self.shape, self.mesh)

    @cached_property
    def _candidates(self) -> Strategies | None:
        """The strategies with rings that may be faster."""
        along = self.device.hiding(self.mesh) if self.offered else ()
        if not along:
            return None
        if self.offers is not None:
            return self.offers.rings(self.shape, self.middle, along, self.offered)
        return rings_of(self.shape, self.mesh, along, self.offered)

    @cached_property
    def _known(self) -> Strategies:
        if self._candidates is None:
            return self._plain
        return together(self._plain, self._candidates, self._faster(self._candidates))

    def layouts(self) -> Iterator[tuple[TensorClass, list[Splits]]]:
        """What may be demanded of every operand, and made of every result, with its class."""
        for strategies in filter(None, (self._plain, self._candidates)):
            yield from zip(self.operand_classes, strategies.demanded, strict=True)
            yield from zip(self.result_classes, strategies.made, strict=True)

    def _faster(self, rings: Strategies) -> list[int]:
        """The places of the rings that take less time than every strategy without one, even if that first converts what
        lies as the ring demands it, and then what it makes to what the ring makes. No plan is faster with the others.
        """
        if not rings.strategies:
            return []
        taken = self.device.compute_seconds_each(*self._plain.work, self.shape.dtype, self.shape.fused.launches)
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
        plain = self._plain
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
        if self.offers is not None and self.shape.computes:  # the same around every plan
            grouped = self.offers.strategies(self.shape, None)
            fused = self.shape.fused.launches
            return float(self.device.compute_seconds_each(*grouped.work, self.shape.dtype, fused).min())
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
