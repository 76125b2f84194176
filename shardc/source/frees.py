"""What is freed before its function ends. A value dies with the function that holds its name; where the rank cannot
hold it for so long, a `del` stands behind its last reader.

    held by the plan, line by line    5 GiB  6 GiB  8 GiB  7 GiB       at most 8 GiB
    `x`, 2 GiB, is dead after line 0; it may stay for lines 1 and 3 but not for line 2: del x
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from shardc.runtime.collectives.collective import wait

SLACK = 0.05
"""What part of the peak stays free of values that stay longer than the plan says: predictions may be off."""

SMALL = 0.005
"""What part of the peak such values may add to it, so that a few bytes need no line of their own."""

Storages = tuple[tuple[int, int], ...]
"""The numbers of the storages of a value's tensors, and their bytes."""


@dataclass(frozen=True)
class Holding:
    """What the plan holds. `lines` has for every node of a half the bytes while it runs, by the half's name; `storages`
    what every value occupies, by the name of its node; `peak` the most that is held at once."""

    lines: Mapping[str, Sequence[float]]
    storages: Mapping[str, Storages]
    peak: float

    def of(self, node: fx.Node) -> Storages:
        """What a value occupies."""
        source = node.args[0] if node.target is wait else node
        return self.storages.get(source.name, ()) if isinstance(source, fx.Node) else ()


@dataclass(frozen=True)
class Unit:
    """Names of one function that hold memory. If they are not deleted, it `stays` from a node of the half to before
    another: from, to, and bytes."""

    names: tuple[fx.Node | str, ...]
    stays: tuple[tuple[int, int, int], ...]

    @property
    def size(self) -> int:
        """The most bytes that stay at once, at least."""
        return max((size for _, _, size in self.stays), default=0)


@dataclass
class Lives:
    """The values of one half: after which node each is read no more, by its place in the half. What stands `behind` a
    node between two runs of a loop has the place of that node, and is not among `nodes`."""

    nodes: Sequence[fx.Node]
    results: set[fx.Node]
    given: set[fx.Node]
    """What is held by others, whatever this half does."""
    held: Holding | None
    half: str
    behind: Mapping[fx.Node, int] = field(default_factory=dict[fx.Node, int])
    place: dict[fx.Node, int] = field(init=False)
    ends: dict[int, int] = field(init=False)
    """After which node each storage is dead."""

    def __post_init__(self) -> None:
        self.place = {node: place for place, node in enumerate(self.nodes)} | dict(self.behind)
        self.ends = {}
        self.room = np.empty(0)
        """Bytes that the rank could hold besides, line by line."""
        if self.held is not None:
            lines = self._lines(np.array(self.held.lines.get(self.half, ()), dtype=float))
            self.room = np.maximum((1.0 - SLACK) * self.held.peak - lines, SMALL * self.held.peak)
        read = dict.fromkeys(self.place)
        for node in self.place:
            read.update(dict.fromkeys(node.all_input_nodes))
        for node in read:
            end = self.last(node)
            for storage, _ in self.storages(node):
                self.ends[storage] = max(self.ends.get(storage, -1), end)

    def _lines(self, held: np.ndarray) -> np.ndarray:
        """What is held while each node runs, and what stands behind it."""
        if not self.behind or not len(held):
            return held
        behind = Counter(self.behind.values())
        first = behind.pop(-1, 0)
        starts = first + np.cumsum([0, *(1 + behind[place] for place in range(len(self.nodes) - 1))])
        return np.maximum.reduceat(held, starts)

    def last(self, node: fx.Node) -> int:
        """The place of the last node that reads a value; behind the end if the value is still there then."""
        if node in self.results or node in self.given:
            return len(self.nodes)
        return max((self.place[user] for user in node.users if user in self.place), default=self.place.get(node, -1))

    def read(self, node: fx.Node) -> bool:
        """Whether anything reads a value, be it the caller."""
        return node in self.results or any(user in self.place for user in node.users)

    def storages(self, node: fx.Node) -> Storages:
        """What a value occupies."""
        return () if self.held is None else self.held.of(node)

    def fits(self, unit: Unit) -> bool:
        """Whether a unit may stay; if so, it does."""
        for start, stop, size in unit.stays:
            self.room[start:stop] -= size
        fits = all(float(self.room[a:b].min(initial=0.0)) >= 0.0 for a, b, _ in unit.stays)
        if not fits:
            for start, stop, size in unit.stays:
                self.room[start:stop] += size
        return fits

    def may_stay(self, values: Sequence[fx.Node], end: int) -> bool:
        """Whether values may stay until the node `end`, as in a list; they count from then on."""
        if self.held is None:
            return True
        kept = {one for node in values for one in self.storages(node)}
        stays = [(self.ends[storage] + 1, end, size) for storage, size in kept if self.ends.get(storage, end) + 1 < end]
        return self.fits(Unit((), tuple(stays)))

    def units(self, names: Sequence[fx.Node], spans: Sequence[tuple[int, int]]) -> list[Unit]:
        """The storages of a function's values, with the spans for which they stay if the function runs from node to
        node of each of `spans`; where it runs several times, `names` are those of the first."""
        by_storage: dict[int, list[fx.Node]] = {}
        sizes: dict[int, int] = {}
        for node in names:
            for storage, size in self.storages(node):
                by_storage.setdefault(storage, []).append(node)
                sizes[storage] = size
        units: list[Unit] = []
        start, length = spans[0][0], spans[0][1] - spans[0][0]
        for storage, nodes in by_storage.items():
            end = self.ends.get(storage, len(self.nodes)) + 1 - start
            if end < length and sizes[storage]:
                late = tuple((a + end, b, sizes[storage]) for a, b in spans)
                units.append(Unit(tuple(nodes), late))
        return units
