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
from functools import cache, cached_property, lru_cache

import numpy as np

from shardc.analysis.bodies import Body, body_of
from shardc.cost.conversion import TensorClass
from shardc.cost.hardware import Hardware
from shardc.ir.mesh import Mesh
from shardc.ir.splits import Splits
from shardc.rules.factors.bodies import is_ring, work
from shardc.rules.factors.strategy import (
    Shape,
    Strategy,
    demand,
    make,
    one_reduction,
    splittable,
    variants_of,
)


@dataclass(eq=False)
class Strategies:
    """Every strategy of one shape on one mesh, and what depends on neither device nor the rest of the program."""

    shape: Shape
    mesh: Mesh

    @cached_property
    def strategies(self) -> list[Strategy]:
        """All strategies of the shape whose results are partial under one reduction at most."""
        return [s for s in _enumerate(self.shape, self.mesh) if one_reduction(self.shape, s, self.mesh)]

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
    def rings(self) -> list[int]:
        """The numbers of the strategies whose bodies go round a ring."""
        return [place for place, strategy in enumerate(self.strategies) if is_ring(self.shape, strategy)]


@lru_cache(maxsize=512)
def strategies_of(shape: Shape, mesh: Mesh) -> Strategies:
    """The strategies of a shape; compilations of whatever program share them."""
    return Strategies(shape, mesh)


@dataclass(eq=False)
class OperatorOptions:
    """Every strategy of one shape, the layouts each demands and makes, and its seconds of compute."""

    shape: Shape
    mesh: Mesh
    device: Hardware
    operand_classes: list[TensorClass]
    result_classes: list[TensorClass]

    def __post_init__(self) -> None:
        self._known = strategies_of(self.shape, self.mesh)

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
            return self.compute
        return self.compute + np.array([self.sending(s) for s in self.strategies])

    def sending(self, strategy: Strategy) -> float:
        """Seconds of the collectives inside the body of one strategy that nothing hides which it computes itself."""
        return self._body(strategy).exposed

    @cached_property
    def compute(self) -> np.ndarray:
        """Compute seconds of each strategy. An operator without operands still takes the time to write its result."""
        if not self.shape.computes:
            return np.zeros(len(self.strategies))
        seconds = self.device.compute_seconds_each(*self._known.work, self.shape.dtype)
        for place in self._unlike:
            seconds[place] = self._body(self.strategies[place]).compute
        return seconds

    @property
    def _unlike(self) -> list[int]:
        """The strategies whose compute is not that of one kernel on the mean of ranks."""
        uneven = {variant.name for variant in self.shape.variants if variant.imbalance != 1.0}
        return [*self._known.rings, *(i for i, one in enumerate(self.strategies) if one.variant in uneven)]

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


def _enumerate(shape: Shape, mesh: Mesh) -> Iterator[Strategy]:
    """One strategy for every split and every variant that runs it."""
    free = [(i,) for i, factor in enumerate(shape.factors) if not factor.whole]
    choices = [(), *free, *shape.bundles, *(f"group {g}" for g in range(len(shape.linear)))]
    options: list[list[tuple[int, ...] | str]] = [choices if ways > 1 else [()] for _, ways in mesh.axes]
    # a tuple: the axis splits these factors; a str: the axis's partial sums pass through this linear group

    @cache
    def splits(factor: int, axes: tuple[str, ...]) -> bool:
        return splittable(shape, factor, axes, mesh)

    @cache
    def variants(split: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
        return variants_of(shape, split)

    for choice in itertools.product(*options):
        passes = tuple((a, int(c[6:])) for a, c in zip(mesh.names, choice, strict=True) if isinstance(c, str))
        axes_of: dict[int, tuple[str, ...]] = {}
        for axis, c in zip(mesh.names, choice, strict=True):
            for factor in c if isinstance(c, tuple) else ():
                axes_of[factor] = (*axes_of.get(factor, ()), axis)
        if all(splits(factor, axes) for factor, axes in axes_of.items()):
            orders = [itertools.permutations(axes_of[i]) if i in axes_of else ((),) for i in range(len(shape.factors))]
            for order in itertools.product(*orders):
                for variant in variants(order):
                    yield Strategy(order, passes, variant=variant)
