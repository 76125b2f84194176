"""A repeated layer as a function, or as two where the last run ends early; and what a call of it takes and gives.

def layer(x: Tensor, q_weight: Tensor, cos: Tensor) -> tuple[Tensor, list[Tensor]]:
    ...
    return x, [q, k]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import fx

from shardc.ir.facts import lowered
from shardc.source.body import Shared, Writer, statements
from shardc.source.frees import Lives, Unit
from shardc.source.places import Spot
from shardc.source.repetition import Loop, Outer, Own
from shardc.source.text import Item, arguments, listed, tuple_of, values, written

MADE = "made"
"""What the list is called of what runs leave that is read further on in the same half. Where one list of all that would
hold too much, there is one for each place up to which they are read."""

LIVING = "nobody else holds them: each is freed with its last name"


@dataclass
class Stretch:
    """The nodes of a run from offset `low` to before `high`, as one function. `before` comes from the part before in a
    list, `after` goes to the part behind in one. `given` are columns that a part behind the first finds in the list,
    too, behind what comes from before; `held` and `same` are columns that are arguments; `groups` the offsets of what
    runs leave, list by list."""

    low: int
    high: int
    before: list[Own | Outer] = field(default_factory=list[Own | Outer])
    after: list[Own | Outer] = field(default_factory=list[Own | Outer])
    given: list[int] = field(default_factory=list[int])
    held: list[int] = field(default_factory=list[int])
    same: list[int] = field(default_factory=list[int])
    groups: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    name: str = ""

    @property
    def in_list(self) -> list[Own | Outer]:
        """What comes to a part behind the first in a list."""
        return [*self.before, *map(Outer, self.given)]


@dataclass
class Layer:
    """How a loop runs. Columns are those of the loop: `given` are those that the first function takes in one list,
    which it empties, so that each value is freed where its last reader is. With `state`, what is carried is in the
    list, too. `groups` are all offsets of what runs leave, list by list. The runs of each of `stretches` follow one
    another; what they leave for what stands between two stretches is in lists of their own.

    A layer whose end is that of another, its `twin`, calls the function of that one: `pairs` has what the twin's end
    reads from before it, and what this one's reads there. The twin then `shares`: its function leaves what either
    keeps."""

    loop: Loop
    given: list[int]
    groups: dict[str, list[int]]
    parts: list[Stretch] = field(default_factory=list[Stretch])
    state: bool = False
    stretches: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    shares: bool = False
    twin: Layer | None = None
    pairs: dict[Own | Outer, Own | Outer] = field(default_factory=dict[Own | Outer, Own | Outer])

    @property
    def carried(self) -> list[int]:
        """The columns that are carried."""
        return self.loop.carried

    @property
    def in_list(self) -> list[int]:
        """The columns that come to the first function in a list."""
        return [*(self.carried if self.state else []), *self.given]

    @property
    def run(self) -> tuple[fx.Node, ...]:
        """The nodes of the run that stands for all."""
        return self.loop.runs[0]

    def carried_node(self, column: int) -> fx.Node:
        """What the first run carries on."""
        offset = self.loop.columns[column].carried
        assert offset is not None
        return self.run[offset]

    def node(self, one: Own | Outer) -> fx.Node:
        """What the first run makes or reads."""
        return self.run[one.offset] if isinstance(one, Own) else self.loop.columns[one.column].values[0]

    def twins(self, node: fx.Node) -> fx.Node:
        """The node of the twin that does what a node of the end does here, or is read there as this one is here."""
        assert self.twin is not None
        end, its = self.parts[-1], self.twin.parts[-1]
        if node in (mine := self.run[end.low : end.high]):
            return self.twin.run[its.low + mine.index(node)]
        return next(self.twin.node(a) for a, b in self.pairs.items() if self.node(b) is node)

    def left(self, part: Stretch, name: str) -> list[int]:
        """Where in a list that a part leaves stand the values that are not kept, from the end."""
        own = set(self.groups[name])
        return [place for place, offset in enumerate(part.groups[name]) if offset not in own][::-1]

    def lists(self, name: str) -> list[tuple[int, int]]:
        """From run to run, the lists of a half that have what runs leave."""
        last = self.stretches[-1][0], len(self.loop.every)
        return [*self.stretches[:-1], last] if name.startswith(MADE) else [(0, last[1])]

    def list_of(self, name: str, number: int = 0) -> str:
        """What one of these lists is called inside of the compiler."""
        return f"{self.parts[0].name} {name} {number}"

    def modules(self) -> list[str]:
        """The user's modules from which the functions come, in order."""
        return [module for node in self.run if (module := lowered(node).origin.module)]


def layer_of(
    loop: Loop, given: list[int], later: list[int], groups: dict[str, list[int]], read_on: Callable[[fx.Node], bool]
) -> Layer:
    """How a loop runs: as two functions where its last run ends early, of which the second finds the columns `later` in
    its list. `read_on` says whether what that run makes is read behind it."""
    layer = Layer(loop, given, groups)
    cuts = [0, *([len(loop.rest)] if loop.rest else []), loop.size]
    for low, high in itertools.pairwise(cuts):
        read = {one.column for offset in range(low, high) for one in loop.operands[offset] if isinstance(one, Outer)}
        part = Stretch(low, high)
        part.same = [n for n in sorted(read) if loop.columns[n].same]
        part.held = [n for n in sorted(read) if not loop.columns[n].same and loop.columns[n].carried is None]
        part.given = later if low else []
        part.held = [n for n in part.held if n not in given and n not in later]
        part.groups = {name: mine for name, all_ in groups.items() if (mine := [o for o in all_ if low <= o < high])}
        layer.parts.append(part)
    if loop.rest:
        first, second = layer.parts
        read_behind = [one for offset in range(second.low, second.high) for one in loop.operands[offset]]
        passed = {one for one in read_behind if isinstance(one, Own) and one.offset < first.high}
        passed |= {one for one in read_behind if isinstance(one, Outer) and (one.column in (*given, *layer.carried))}
        kept = {offset for group in groups.values() for offset in group}
        ends = {Own(offset) for offset, node in enumerate(loop.rest) if offset not in kept and read_on(node)}
        passed |= ends
        first.after = second.before = sorted(passed, key=_in_order)
    return layer


def _in_order(one: Own | Outer) -> tuple[int, int]:
    """First what a run makes, then what it reads."""
    return (0, one.offset) if isinstance(one, Own) else (1, one.column)


def spans_of(layer: Layer, part: Stretch) -> list[tuple[int, int]]:
    """From node to node of the half, every time that a part runs."""
    runs = len(layer.loop.runs) + bool(layer.loop.rest and part is layer.parts[0])
    starts = [layer.loop.start + run * layer.loop.size for run in range(runs)]
    return [(start + part.low, start + part.high) for start in starts]


def own_units(layer: Layer, part: Stretch, lives: Lives) -> list[Unit]:
    """The storages that a function may free."""
    first = part is layer.parts[0]
    columns = [layer.loop.columns[n].values[0] for n in layer.in_list] if first else list(map(layer.node, part.in_list))
    inside = set(columns)
    outside = {column.values[0] for column in layer.loop.columns} - inside
    theirs = {storage for node in outside for storage, _ in lives.storages(node)}
    names = [*columns, *layer.run[part.low : part.high]]
    mine = [n for n in names if all(storage not in theirs for storage, _ in lives.storages(n))]
    return lives.units(mine, spans_of(layer, part))


def carried_unit(layer: Layer, lives: Lives) -> Unit:
    """What the loop holds of every run while the next one runs, if what is carried is passed as an argument."""
    late: list[tuple[int, int, int]] = []
    for number in layer.carried:
        offset = layer.loop.columns[number].carried
        assert offset is not None
        first = layer.loop.columns[number].values[0]
        for run, value in enumerate([first, *(run[offset] for run in layer.loop.runs[:-1])]):
            stop = layer.loop.start + (run + 1) * layer.loop.size
            for storage, size in lives.storages(value):
                end = lives.ends[storage] + 1
                if end < stop and size:
                    late.append((end, stop, size))
    return Unit((), tuple(late))


class Function:
    """Writes the function of a part."""

    def __init__(self, layer: Layer, part: Stretch, shared: Shared, wanted: Callable[[int], str]) -> None:
        self.layer, self.part, self.shared = layer, part, shared
        self.writer = Writer(shared, layer.run[part.low : part.high], layer=True)
        self.first, self.last = part is layer.parts[0], part is layer.parts[-1]
        self.columns: dict[int, Spot] = {}
        loop = layer.loop
        read = {one.column for o in range(part.low, part.high) for one in loop.operands[o] if isinstance(one, Outer)}
        read.update(layer.given if self.first else part.given)
        read.update(one.column for one in (*part.before, *part.after) if isinstance(one, Outer))
        for number in sorted({*read, *(layer.carried if self.first else ())}):
            column = loop.columns[number]
            name = wanted(number) if column.carried is not None else shared.naming.of(column.values[0], True)
            self.columns[number] = Spot(self.writer.scope.name(name))
        self.given = list[Own | Outer](map(Outer, layer.in_list)) if self.first else part.in_list
        self.taken = self.writer.scope.name("given") if self.given else ""

    def lines(self, dropped: Collection[fx.Node | str] | None, doc: str) -> list[str]:
        """All lines. `dropped` are values that are deleted behind their last reader; None for all."""
        layer, part, writer = self.layer, self.part, self.writer
        loop, run = layer.loop, layer.run
        for one in self.given:
            if isinstance(one, Own):
                writer.name(run[one.offset])
            else:
                writer.own(self.columns[one.column].name, layer.node(one))
        if self.taken:
            writer.add(values([str(self._place(one)) for one in self.given]), f" = {self.taken}")
            writer.add(f"{self.taken}.clear()", comment=LIVING)
        mine = run[part.low : part.high]
        left = {*(layer.node(one) for one in part.after), *(run[o] for group in part.groups.values() for o in group)}
        left |= {layer.carried_node(number) for number in layer.carried} if self.last else set()
        lines, offsets = statements(mine), {node: offset for offset, node in enumerate(run)}
        for number, node in enumerate(lines):
            read = loop.operands[offsets[node]]
            if read and writer.nest(node, partial(self._place, read[0])):
                continue
            writer.begin()
            writer.header(node, itertools.islice(lines, number, None))
            own = bool(read) and isinstance(read[0], Own) and run[read[0].offset] not in left
            own = own and isinstance(read[0], Own) and read[0].offset >= part.low
            writer.call(node, lambda read=read: list(map(self._place, read)), own)
        body = writer.lines(left, dropped)
        return [*self._head(doc), *body, *self._leave()]

    def _place(self, one: Own | Outer) -> Spot:
        if isinstance(one, Own):
            return self.writer.place(self.layer.run[one.offset])
        return self.writer.read(self.columns[one.column])

    def _leave(self) -> list[str]:
        layer, part = self.layer, self.part
        lists = [listed([str(self.writer.place(layer.run[o])) for o in group]) for group in part.groups.values()]
        items: list[Item]
        if not self.last:
            items = [listed([str(self._place(one)) for one in part.after]), *lists]
        else:
            carried = [str(self.writer.place(layer.carried_node(number))) for number in layer.carried]
            items = [*([listed(carried)] if layer.state else carried), *lists]
        return written(["return ", tuple_of(items)], 1)

    def _head(self, doc: str) -> list[str]:
        layer, part, shared = self.layer, self.part, self.shared

        def annotated(numbers: Iterable[int]) -> list[str]:
            columns = layer.loop.columns
            return [f"{self.columns[n]}: {shared.annotation(columns[n].values[0])}" for n in numbers]

        first = annotated(layer.carried) if self.first and not layer.state else []
        if self.taken:
            first.append(f"{self.taken}: {shared.list_of(map(layer.node, self.given))}")
        parameters = [*first, *annotated((*part.held, *part.same))]
        nodes = list(map(layer.carried_node, layer.carried))
        made = [shared.list_of(nodes)] if layer.state else list(map(shared.annotation, nodes))
        made = made if self.last else [shared.list_of(map(layer.node, part.after))]
        made += [shared.list_of(layer.run[offset] for offset in group) for group in part.groups.values()]
        returns = made[0] if len(made) == 1 else f"tuple[{', '.join(made)}]" if made else "None"
        return [*written([f"def {part.name}", arguments(parameters), f" -> {returns}:"], 0), f'    """{doc}"""']


def layer_names(runs: Sequence[Sequence[fx.Node]]) -> str:
    """`model.layers.0 to model.layers.31`: the layers of the user's of which these are runs."""

    def first(run: Sequence[fx.Node]) -> str:
        for node in run:
            parts = lowered(node).origin.module.split(".")
            numbers = [place for place, part in enumerate(parts) if part.isdigit()]
            if numbers:
                return ".".join(parts[: numbers[0] + 1])
        return ""

    one, other = first(runs[0]), first(runs[-1])
    return f"{one} to {other}" if one and other and one != other else one
