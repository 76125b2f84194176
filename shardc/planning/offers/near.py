"""The strategies among which a plan is looked for where an operator has too many to list them all.

mm on a=2,b=2,c=2,d=8, where the plan so far splits m by a, b, c and n by d:

    a set of axes does one other thing      a, c split k; b splits m; d splits n
    two axes change places                  d, b, c split m; a splits n

On four axes a product of matrices has some ten thousand strategies. A first plan is made of those in which all axes
between nodes act as one, and all within a node: the *grouped* ones. Each operator is then offered what lies *near* its
strategy of that plan, as above. The network is solved again, around its solution, until that stays where it is. So what
is proved holds for plans in which every operator does what is near the plan, whatever all others do at the same time.
Nothing is proved of plans further away.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import contains

from torch import fx

from shardc.cost.hardware import Hardware
from shardc.cost.step_graph import StepGraph
from shardc.ir.mesh import Mesh
from shardc.ir.splits import Folds, Splits
from shardc.planning.offers import words
from shardc.planning.offers.listed import Atoms, Layouts
from shardc.planning.strategies import Strategies
from shardc.rules.factors.factored import Factored
from shardc.rules.factors.strategy import Shape, Strategy, legal, one_reduction, shape_of

MOST_WORDS = 2000
"""Words of one operator up to which all of its strategies are offered. A product of matrices with two dims of rows has
343 on three axes, and 2401 on four."""
FEW_AXES = 3
"""Axes up to which all strategies are offered, however many they are."""


def too_many(factored: Factored, mesh: Mesh) -> bool:
    """Whether an operator has too many strategies to list."""
    if sum(ways > 1 for _, ways in mesh.axes) <= FEW_AXES:
        return False
    kinds = {op.kind: op for op in factored.ops}.values()
    return any(math.prod(map(len, words.letters(shape_of(op), mesh))) > MOST_WORDS for op in kinds)


@dataclass(eq=False)
class Offers:
    """What is offered to every operator: what is near its strategy in `centre`, or, where that has none, the grouped
    strategies. `layouts` are layouts of the plan in the centre, by the sizes of atoms and their folds."""

    mesh: Mesh
    device: Hardware
    centre: Mapping[fx.Node, Strategy] = field(default_factory=dict[fx.Node, Strategy])
    layouts: Layouts = field(default_factory=dict[Atoms, list[Splits]])
    _known: dict[object, Strategies] = field(default_factory=dict[object, Strategies])

    def around(self, centre: Mapping[fx.Node, Strategy], layouts: Layouts) -> Offers:
        """The offers around a plan, on the same mesh."""
        once = {node: strategy._replace(again=False) for node, strategy in centre.items()}
        return Offers(self.mesh, self.device, once, layouts, self._known)

    def middle(self, node: fx.Node, shape: Shape) -> Strategy | None:
        """The strategy that the offers to an operator are near to."""
        strategy = self.centre.get(node)
        return strategy if strategy is not None and legal(shape, strategy, self.mesh) else None

    def strategies(self, shape: Shape, middle: Strategy | None) -> Strategies:
        """Those that are offered to an operator of a shape, but for rings."""

        def grouped() -> Iterator[Strategy]:
            return words.written(shape, self.mesh, dict.fromkeys(self._grouped(shape)), _as_the_mesh)

        def near(chosen: Strategy) -> Iterator[Strategy]:
            def orders(factor: int, axes: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
                now = chosen.split[factor]
                return dict.fromkeys([*_rotated(factor, axes), *[now] * (set(now) == set(axes))])

            beside = words.beside(words.word_of(chosen, self.mesh), words.letters(shape, self.mesh))
            return words.written(shape, self.mesh, dict.fromkeys(beside), orders)

        def listed() -> Iterator[Strategy]:
            return grouped() if middle is None else near(middle)

        return self._remembered((shape, middle), shape, listed)

    def rings(
        self, shape: Shape, middle: Strategy | None, along: tuple[str, ...], variants: frozenset[str]
    ) -> Strategies:
        """Those in which something goes round one of the axes `along`, and all others do what they do in the middle;
        none near the first plan."""

        def listed() -> Iterator[Strategy]:
            now = () if middle is None else words.word_of(middle, self.mesh)
            for axis in along if now else ():
                options, place = words.ring_letters(shape, self.mesh, axis, variants), self.mesh.names.index(axis)
                round_it = [(*now[:place], letter, *now[place + 1 :]) for letter in options[place]]
                ring = [word for word in round_it if all(map(contains, options, word))]
                yield from words.rings(shape, self.mesh, axis, variants, ring)

        return self._remembered((shape, middle, along, variants), shape, listed)

    def _grouped(self, shape: Shape) -> Iterator[words.Word]:
        """The words in which all axes of a group do the same."""
        options, cut = words.letters(shape, self.mesh), self._cut
        groups = [range(cut), range(cut, len(options))]
        several = [max((options[i] for i in group), key=len) for group in groups]
        for choice in itertools.product(*several):
            doing = [letter for letter, group in zip(choice, groups, strict=True) for _ in group]
            yield tuple(letter if len(some) > 1 else words.NOTHING for letter, some in zip(doing, options, strict=True))

    @property
    def _cut(self) -> int:
        """The first axis of the second group: where nodes begin, or in the middle."""
        ranks = [ways for _, ways in self.mesh.axes]
        cuts = [cut for cut in range(1, len(ranks)) if math.prod(ranks[cut:]) == self.device.devices_per_node]
        return cuts[0] if cuts and math.prod(ranks[: cuts[0]]) > 1 else len(ranks) // 2

    def _remembered(self, key: object, shape: Shape, listed: Callable[[], Iterable[Strategy]]) -> Strategies:
        if key not in self._known:
            each = [s for s in dict.fromkeys(listed()) if one_reduction(shape, s, self.mesh)]
            self._known[key] = Strategies(shape, self.mesh, each)
        return self._known[key]


def graph_of(
    sizes: tuple[int, ...], mesh: Mesh, ops: tuple[str, ...], folds: Folds, layouts: Iterable[Splits]
) -> StepGraph:
    """The steps between some layouts, and those on the way from them to the whole tensor."""
    known = dict.fromkeys(layouts)
    waiting = [*known]
    while waiting:
        for below in _below(waiting.pop()):
            if below not in known:
                known[below] = None
                waiting.append(below)
    known.setdefault(Splits(((),) * len(sizes)))
    return StepGraph(sizes, mesh, ops, folds, tuple(known))


def _below(splits: Splits) -> Iterator[Splits]:
    """The layouts with one axis less."""
    for atom, axes in enumerate(splits.axes):
        if axes:
            yield Splits((*splits.axes[:atom], axes[:-1], *splits.axes[atom + 1 :]), splits.partial)
    for axis in splits.partial:
        yield Splits(splits.axes, tuple(one for one in splits.partial if one != axis))


def _as_the_mesh(_: int, axes: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    return (axes,)


def _rotated(_: int, axes: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    """The axes in the mesh's order, but that one may be last."""
    return dict.fromkeys([axes, *((*axes[:i], *axes[i + 1 :], axis) for i, axis in enumerate(axes))])
