"""Repeated layers in a scheduled graph: equal stretches of nodes, which become one function that is called in a loop.

    a0 = mm(x, w0)          for i in range(3):
    y0 = relu(a0)               x = layer(x, w[i])
    a1 = mm(y0, w1)
    y1 = relu(a1)           what layer 1 reads at the place where layer 0 read `x` is what layer 0 made: it is carried.
    a2 = mm(y1, w2)         The weights differ from run to run: they vary. What every layer reads is the same.
    y2 = relu(a2)

What counts is the graph that runs. Two layers of the user's that were planned, bucketed or overlapped differently are
not equal here; nor are those that read something else of one another.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import fx

from shardc.ir.facts import lowered
from shardc.ir.mesh import Mesh
from shardc.ir.program import name_of

LEAST_NODES = 4
"""Nodes of the smallest stretch that becomes a function."""

LEAST_SAVED = 12
"""Nodes that a loop must save for a function to be worth it."""

MOST_PERIODS = 6
MOST_STARTS = 16
"""How many lengths of a stretch are tried, and at how many places it may begin."""

LoopPlace = tuple[str, int]
"""The half that a loop is in, and where it begins there."""


@dataclass(frozen=True)
class Own:
    """An operand that the same run has made, as its node number `offset`."""

    offset: int


@dataclass(frozen=True)
class Outer:
    """An operand from outside of the run: number `column` of `Loop.columns`."""

    column: int


@dataclass(frozen=True)
class Column:
    """What the runs of a loop read at one place, run by run. `carried` is the offset of the node of the run before that
    makes it from the second run on; the first reads `values[0]`."""

    values: tuple[fx.Node, ...]
    carried: int | None = None

    @property
    def same(self) -> bool:
        """Whether every run reads the same value."""
        return self.carried is None and self.values.count(self.values[0]) == len(self.values)


@dataclass(frozen=True)
class Loop:
    """`runs` of equal nodes, one after another. `operands` has for every node of a run its operands, in the order in
    which a call is printed. All runs leave what they make at `kept` offsets to what follows.

    `rest` are nodes behind the last run that are those of one more run, as far as they go; then other nodes stand
    between. `reads` has what that run reads, by column; those that vary are not known where it does not come to them.
    """

    start: int
    runs: tuple[tuple[fx.Node, ...], ...]
    columns: tuple[Column, ...]
    operands: tuple[tuple[Own | Outer, ...], ...]
    kept: tuple[int, ...]
    rest: tuple[fx.Node, ...] = ()
    reads: tuple[fx.Node | None, ...] = ()

    @property
    def size(self) -> int:
        """Nodes of one run."""
        return len(self.runs[0])

    @property
    def stop(self) -> int:
        """The place after the last node."""
        return self.start + self.size * len(self.runs) + len(self.rest)

    @property
    def every(self) -> tuple[tuple[fx.Node, ...], ...]:
        """All runs, and the one that does not end, if there is one."""
        return (*self.runs, self.rest) if self.rest else self.runs

    def values(self, column: int) -> list[fx.Node | None]:
        """What every run reads in a column, and the one that does not end."""
        return [*self.columns[column].values, *([self.reads[column]] if self.rest else [])]

    def begins_at(self, column: int) -> int:
        """The offset of the first node that reads a column."""
        return next(offset for offset, read in enumerate(self.operands) if Outer(column) in read)

    @property
    def carried(self) -> list[int]:
        """The columns that are carried from run to run."""
        return [number for number, column in enumerate(self.columns) if column.carried is not None]


def operands_of(node: fx.Node) -> list[fx.Node]:
    """What a node reads, in the order in which it is printed, with repetitions."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, dict(node.kwargs)), found.append)
    return found


_DIGITS = re.compile(r"\d+")


@cache
def _pattern(module: str) -> str:
    return _DIGITS.sub("#", module)


def key_of(node: fx.Node, mesh: Mesh) -> Hashable:
    """What two nodes have in common if they are the same call at the same place of two layers, operands apart."""
    facts = lowered(node)
    layout = None if facts.layout is None else facts.layout.simplify(mesh)
    place = facts.origin
    skeleton = repr(fx.map_arg((node.args, dict(node.kwargs)), lambda _: _MARK))  # type: ignore[arg-type, return-value]
    started = tuple(sorted(name_of(user.target) for user in node.users if user.op == "call_function"))
    waits = "wait" in started
    return node.target, skeleton, layout, facts.dtype, _pattern(place.module), place.source, place.phase, waits


class _Mark:
    def __repr__(self) -> str:
        return "%"


_MARK: Any = _Mark()


def repeated(nodes: Sequence[fx.Node], results: Collection[fx.Node], mesh: Mesh) -> list[Loop]:
    """The loops among the nodes of a function, in order; no two overlap. `results` are values that must be there when
    the function ends."""
    return _Search(nodes, results, mesh).loops()


class _Search:
    def __init__(self, nodes: Sequence[fx.Node], results: Collection[fx.Node], mesh: Mesh) -> None:
        self.nodes, self.results = nodes, set(results)
        self.place = {node: place for place, node in enumerate(nodes)}
        numbers: dict[Hashable, int] = {}
        self.keys = [numbers.setdefault(key_of(node, mesh), len(numbers)) for node in nodes]
        self.operands = [operands_of(node) for node in nodes]

    def loops(self) -> list[Loop]:
        found: list[Loop] = []
        stretches = [(0, len(self.nodes))]
        while stretches:
            low, high = stretches.pop()
            loop = self._best(low, high)
            if loop is not None:
                found.append(loop)
                stretches += [(low, loop.start), (loop.stop, high)]
        return sorted(found, key=lambda loop: loop.start)

    def _best(self, low: int, high: int) -> Loop | None:
        """The loop that saves most between two places."""
        best: Loop | None = None
        for start, stop, period in self._stretches(low, high):
            most = ((stop - start) // period - 1) * period
            if most < LEAST_SAVED or (best is not None and most <= _saved(best)):
                continue
            for loop in self._within(start, stop, period):
                if best is None or _saved(loop) > _saved(best):
                    best = loop
        return best

    def _stretches(self, low: int, high: int) -> list[tuple[int, int, int]]:
        """Where keys repeat: from, to, and with which period; what may save most comes first."""
        last: dict[int, int] = {}
        gaps: Counter[int] = Counter()
        for place in range(low, high):
            before = last.get(self.keys[place])
            if before is not None:
                gaps[place - before] += 1
            last[self.keys[place]] = place
        found: list[tuple[int, int, int]] = []
        wide = sorted(((gap, votes) for gap, votes in gaps.items() if gap >= LEAST_NODES), key=lambda one: -one[1])
        for period, _ in wide[:MOST_PERIODS]:
            start = low
            for place in range(low, high - period + 1):
                if place + period == high or self.keys[place] != self.keys[place + period]:
                    if place - start >= period:
                        found.append((start, place + period, period))
                    start = place + 1
        return sorted(found, key=lambda one: -(one[1] - one[0] - one[2]))

    def _within(self, start: int, stop: int, period: int) -> Iterator[Loop]:
        """A loop in a stretch of repeated keys, if there is one: the longest, and of these the one that begins where a
        layer of the user's does, or carries least."""
        for missing in range(3):
            tried: list[tuple[int, int, Loop]] = []
            for first in self._starts(start, stop, period):
                count = (stop - first) // period
                if count - missing < 2:
                    continue
                for front in range(missing + 1):
                    loop = self._loop(first + front * period, period, count - missing)
                    if loop is not None:
                        tried.append((-len(loop.runs), len(loop.carried), loop))
            if tried:
                yield self._with_rest(min(tried, key=lambda one: one[:2])[2], stop)
                return
        yield from self._leaving_alike(start, stop, period)

    def _leaving_alike(self, start: int, stop: int, period: int) -> Iterator[Loop]:
        """Loops of the runs of a stretch that leave alike: backward may need more of some layers than of others."""
        for first in self._starts(start, stop, period):
            found: list[Loop] = []
            leaves = [
                [offset for offset in range(period) if self.nodes[run + offset] in self.results]
                for run in range(first, stop - period + 1, period)
            ]
            run = 0
            for _, alike in itertools.groupby(leaves):
                count = len(list(alike))
                loops = (self._loop(first + run * period, period, less) for less in (count, count - 1) if less > 1)
                found += itertools.islice(filter(None, loops), 1)
                run += count
            if found:
                yield max(found, key=_saved)
                return

    def _with_rest(self, loop: Loop, stop: int) -> Loop:
        """The loop with the nodes behind it that are those of one more run, which ends early."""
        size, count = loop.size, len(loop.runs)
        first = loop.start + size * count
        stop = min(stop, first + size - 1)
        reads: list[fx.Node | None] = [c.values[0] if c.same else None for c in loop.columns]
        for number, column in enumerate(loop.columns):
            if column.carried is not None:
                reads[number] = loop.runs[-1][column.carried]
        taken = 0
        while taken < loop.size - 1 and first + taken < stop and self._alike(loop, first, taken, reads):
            taken += 1
        carried = {column.carried for column in loop.columns if column.carried is not None}
        taken = min([taken, *carried])
        for offset in range(taken):
            node = self.nodes[first + offset]
            left = node in self.results or any(self.place.get(user, -1) >= first + taken for user in node.users)
            if offset in loop.kept and not left:
                taken = offset
                break
        # reads beyond what is taken may be wrong: they are asked again
        reads = [one if c.same or c.carried is not None else None for one, c in zip(reads, loop.columns, strict=True)]
        for offset in range(taken):
            self._alike(loop, first, offset, reads)
        if taken < LEAST_SAVED:
            return loop
        return replace(loop, rest=tuple(self.nodes[first : first + taken]), reads=tuple(reads))

    def _alike(self, loop: Loop, first: int, offset: int, reads: list[fx.Node | None]) -> bool:
        """Whether a node behind the loop reads as that of a run does; notes what it reads."""
        operands = self.operands[first + offset]
        for value, one in zip(operands, loop.operands[offset], strict=True):
            if isinstance(one, Own):
                if self.place.get(value) != first + one.offset:
                    return False
                continue
            if reads[one.column] is None and self.place.get(value, -1) < loop.start:
                reads[one.column] = value
            if reads[one.column] is not value:
                return False
        return True

    def _starts(self, start: int, stop: int, period: int) -> list[int]:
        """Places at which the first run may begin: those where another layer begins, and the first."""
        places = range(start, min(start + period, stop - 2 * period + 1))
        layers = [_DIGITS.findall(lowered(self.nodes[place]).origin.module)[:1] for place in places]
        borders = [place for place, one, other in zip(places[1:], layers, layers[1:], strict=False) if one != other]
        return list(dict.fromkeys([places[0], *borders]))[:MOST_STARTS] if len(places) else []

    def _loop(self, start: int, period: int, count: int) -> Loop | None:
        """The loop of `count` runs from a place on; None where the runs do not read alike or leave alike."""
        columns: dict[Column, int] = {}
        operands: list[tuple[Own | Outer, ...]] = []
        for offset in range(period):
            read: list[Own | Outer] = []
            for values in zip(*(self.operands[start + run * period + offset] for run in range(count)), strict=True):
                one = self._operand(values, start, period, count)
                if one is None:
                    return None
                read.append(one if isinstance(one, Own) else Outer(columns.setdefault(one, len(columns))))
            operands.append(tuple(read))
        kept = self._kept({c.carried for c in columns if c.carried is not None}, start, period, count)
        if kept is None:
            return None
        runs = tuple(tuple(self.nodes[start + run * period : start + (run + 1) * period]) for run in range(count))
        return Loop(start, runs, tuple(columns), tuple(operands), kept)

    def _operand(self, values: tuple[fx.Node, ...], start: int, period: int, count: int) -> Own | Column | None:
        places = [self.place.get(value, -1) for value in values]
        within = [start <= place < start + count * period for place in places]
        if not any(within):
            return Column(values)
        own = [place - start - run * period for run, place in enumerate(places)]
        if own.count(own[0]) == count and 0 <= own[0] < period:
            return Own(own[0])
        before = [place + period for place in own[1:]]
        if not within[0] and before.count(before[0]) == count - 1 and 0 <= before[0] < period:
            return Column(values, before[0])
        return None

    def _kept(self, carried: set[int], start: int, period: int, count: int) -> tuple[int, ...] | None:
        """The offsets whose values are read after the loop, of every run. Of the last run alone what it would have
        carried on may be read. None where some runs leave what others do not."""
        stop = start + count * period
        runs: dict[int, list[int]] = defaultdict(list)
        for place in range(start, stop):
            node = self.nodes[place]
            if node in self.results or any(self.place.get(user, -1) >= stop for user in node.users):
                runs[(place - start) % period].append((place - start) // period)
        for offset, those in runs.items():
            if len(those) != count and (those != [count - 1] or offset not in carried):
                return None
        return tuple(sorted(offset for offset, those in runs.items() if len(those) == count))


def _saved(loop: Loop) -> int:
    return loop.size * (len(loop.runs) - 1)
