"""Forward and backward: straight lines, loops over repeated layers, and lists of what their runs read and leave."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from shardc.source.body import Shared, Writer, statements
from shardc.source.frees import Held, Lives, Unit
from shardc.source.layers import Layer, carried_units, function, modules_of, own_units
from shardc.source.naming import layer_name
from shardc.source.places import Place, moving, spread, turn
from shardc.source.repetition import Loop, columns_by_value, operands_of, repeated
from shardc.source.text import Item, arguments, listed, tuple_of, values, written

LEAST_GIVEN = 4
"""Arguments in a row that loops read, which get one list instead of names."""


class TooLong(Exception):
    """Lists of what runs leave would hold more than the plan says."""


@dataclass
class Taken:
    """A list of which a loop takes `count` values for each run, from the end. `columns` are those of the loop."""

    wanted: str
    loop: Loop
    columns: list[int]
    name: str = ""

    @property
    def nodes(self) -> list[fx.Node]:
        """Its values, in order."""
        runs = reversed(range(len(self.loop.runs)))
        return [self.loop.columns[column].values[run] for run in runs for column in self.columns]


class Half:
    """Writes one half. `results` are the values that it leaves; `kept` those of them that backward reads."""

    def __init__(
        self,
        name: str,
        nodes: Sequence[fx.Node],
        results: Iterable[fx.Node | None],
        kept: Iterable[fx.Node],
        shared: Shared,
        held: Held | None,
        given: set[fx.Node],
        loops: bool,
    ) -> None:
        self.name, self.nodes, self.shared, self.held = name, nodes, shared, held
        self.results = {node for node in results if node is not None}
        self.kept = set(kept)
        self.lives = Lives(nodes, self.results, given, held, name)
        self.loops = repeated(nodes, self.results, shared.mesh) if loops else []
        inside = {node for loop in self.loops for run in loop.runs for node in run}
        self.inline = [node for node in nodes if node not in inside]
        self.writer = Writer(shared, self.inline, layer=False)
        self.layers: list[Layer] = []
        self.functions: list[str] = []

    # what loops read

    def taken(self, forward: Half | None, saved: Sequence[fx.Node]) -> list[Taken]:
        """The lists of saved values that loops may take from: each value is read in one run alone."""
        found: list[Taken] = []
        mine, claimed = set(saved), set[fx.Node]()
        for loop in self.loops:
            groups: dict[str, list[int]] = {}
            for number, column in enumerate(loop.columns):
                if column.carried is None and not column.same and not claimed.intersection(column.values):
                    if mine.issuperset(column.values) and self._read_within(loop, number):
                        claimed.update(column.values)
                        place = forward.writer.where.get(column.values[0]) if forward else None
                        groups.setdefault(place.name if place and place.index is not None else "", []).append(number)
            for name, columns in groups.items():
                if forward:
                    columns.sort(key=lambda number: self._index(forward, loop, number))
                found.append(Taken(name or "saved", loop, columns))
        return found

    def _index(self, forward: Half, loop: Loop, number: int) -> int:
        place = forward.writer.where.get(loop.columns[number].values[0])
        return place.index if place is not None and place.index is not None else number

    def _read_within(self, loop: Loop, number: int) -> bool:
        """Whether every value of a column is read in its own run alone."""
        for run, value in enumerate(loop.columns[number].values):
            start = loop.start + run * loop.size
            places = [self.lives.place[user] for user in value.users if user in self.lives.place]
            if value in self.results or not all(start <= place < start + loop.size for place in places):
                return False
        return True

    # writing

    def write(self, takes: Sequence[Taken]) -> None:
        """Write everything but the beginning and the return."""
        for loop in self.loops:
            self.layers.append(self._layer(loop, [one for one in takes if one.loop is loop]))
        dropped = self._dropped()
        lines, at = statements(self.inline), 0
        for number, loop in enumerate([*self.loops, None]):
            stop = len(self.nodes) if loop is None else loop.start
            while at < len(lines) and self.lives.place[lines[at]] < stop:
                self._line(lines[at], self._until(lines[at:], stop))
                at += 1
            if loop is not None:
                layer = self.layers[number]
                self._loop(layer, [one for one in takes if one.loop is loop])
                self._function(layer, dropped)
        self.dropped = dropped

    def _until(self, lines: Sequence[fx.Node], stop: int) -> list[fx.Node]:
        return [node for node in lines if self.lives.place[node] < stop]

    def _line(self, node: fx.Node, following: Sequence[fx.Node]) -> None:
        self.writer.begin()
        self.writer.header(node, following)
        operands = operands_of(node)
        first = operands[0] if operands else None
        own = first in self.writer.here and first not in self.results
        self.writer.call(node, [self.writer.place(operand) for operand in operands], own)

    def _layer(self, loop: Loop, takes: Sequence[Taken]) -> Layer:
        given = [column for one in takes for column in one.columns]
        varying = [n for n, c in enumerate(loop.columns) if c.carried is None and not c.same and n not in given]
        same = [n for n, c in enumerate(loop.columns) if c.same]
        groups: dict[str, list[int]] = {}
        for offset in loop.kept:
            runs = {run[offset] for run in loop.runs}
            name = "saved" if runs & self.kept else "grads" if runs & self.results else "made"
            groups.setdefault(name, []).append(offset)
        layer = Layer(loop, "", False, given, varying, same, groups)
        wanted = layer_name(modules_of(layer))
        wanted = wanted if self.name == "forward" else f"{wanted}_{self.name}"
        taken, count = wanted, 1
        while taken in self.shared.taken:
            count += 1
            taken = f"{wanted}_{count}"
        self.shared.taken.add(taken)
        self.writer.scope.taken.add(taken)
        layer.name = taken
        return layer

    def _dropped(self) -> set[fx.Node | str] | None:
        """What is deleted before its function ends; None for everything."""
        if self.held is None:
            for layer in self.layers:
                layer.state = bool(layer.carried)
            return None
        units: list[Unit] = []
        for layer in self.layers:
            fits = [self.lives.fits(unit) for unit in carried_units(layer, self.lives)]
            layer.state = not all(fits)
            units += own_units(layer, self.lives)
        units += self.lives.units([*self.inline, *self.writer.where], [(0, len(self.nodes))])
        dropped = self._dropped_lists()
        for unit in sorted(units, key=lambda unit: unit.size):
            if not self.lives.fits(unit):
                dropped.update(unit.names)
        return dropped

    def _dropped_lists(self) -> set[fx.Node | str]:
        """The lists of what runs leave that are deleted behind their last reader. Raises TooLong where even then they
        would hold more than fits."""
        dropped: set[fx.Node | str] = set()
        for layer in self.layers:
            for name, group in layer.groups.items():
                made = [run[offset] for run in layer.loop.runs for offset in group]
                last = max(self.lives.last(node) for node in made) + 1
                for stop in (len(self.nodes), last):
                    stays = [
                        (self.lives.ends[storage] + 1, stop, size)
                        for node in made
                        for storage, size in self.lives.storages(node)
                        if self.lives.ends[storage] + 1 < stop
                    ]
                    if self.lives.fits(Unit((), tuple(stays))):
                        break
                    if stop == last:
                        raise TooLong
                    dropped.add(f"{layer.name} {name}")
        return dropped

    def _loop(self, layer: Layer, takes: Sequence[Taken]) -> None:
        loop, writer = layer.loop, self.writer
        writer.begin()
        carried = [self._carried(layer, number) for number in layer.carried]
        lists = {name: writer.scope.name(name) for name in layer.groups}
        state = writer.scope.name("state") if layer.state else ""
        if state:
            initial = [writer.place(loop.columns[number].values[0]) for number in layer.carried]
            writer.add(f"{state} = ", listed(map(str, initial)))
            writer.begin()  # where the names may be deleted
        for name, whole in lists.items():
            kinds = self.shared.list_of(layer.run[offset] for offset in layer.groups[name])
            writer.add(f"{whole}: {kinds} = []")
        for name, whole in lists.items():
            writer.own(whole, f"{layer.name} {name}")
        if not state:
            for number, name in zip(layer.carried, carried, strict=True):
                initial = writer.place(loop.columns[number].values[0])
                if str(initial) != name:
                    writer.add(f"{name} = {initial}")
        held = self._varying(layer)
        turns = "i" if any("i" in re.split(r"\W+", item) for item in held) else "_"
        writer.add(f"for {turns} in range({len(loop.runs)}):", comment=_which(loop))
        writer.level += 1
        given = [f"take({one.name}, {len(one.columns)})" for one in takes]
        if takes:
            self.shared.used.add("take")
        if state:
            given = [f"take({state}, {len(layer.carried)})", *given]
            self.shared.used.add("take")
        same = [str(writer.place(loop.columns[number].values[0])) for number in layer.same]
        passed = [*([] if state else carried), *([" + ".join(given)] if given else []), *held, *same]
        left = {name: writer.scope.name({"saved": "kept"}.get(name, f"new_{name}")) for name in lists}
        targets = [*([state] if state else carried), *left.values()]
        call: list[Item] = [layer.name, arguments(passed)]
        writer.add(*([tuple_of(targets), " = "] if targets else []), *call)
        for name, whole in lists.items():
            writer.add(f"{whole} += {left[name]}")
        writer.level -= 1
        if state:
            writer.add(values(carried), f" = {state}")
            writer.add(f"{state}.clear()")
        self._after(layer, carried, lists)

    def _carried(self, layer: Layer, number: int) -> str:
        """What a loop calls a value that it carries: as what it starts from is called, if nobody else reads that."""
        column = layer.loop.columns[number]
        first = self.writer.where.get(column.values[0])
        alone = column.values[0] in self.writer.here and self.lives.last(column.values[0]) < layer.loop.stop
        if first is not None and first.index is None and alone and not layer.state:
            return first.name
        return self.writer.scope.name(self._wanted(layer, number))

    def _wanted(self, layer: Layer, number: int) -> str:
        if len(layer.carried) == 1:
            return "x" if self.name == "forward" else "grad"
        return self.shared.naming.of(layer.carried_node(number), True)

    def _after(self, layer: Layer, carried: Sequence[str], lists: dict[str, str]) -> None:
        """Where the values are once the loop has run."""
        loop, writer = layer.loop, self.writer
        for number, name in zip(layer.carried, carried, strict=True):
            offset = loop.columns[number].carried
            assert offset is not None
            last = loop.runs[-1][offset]
            if last not in writer.where:
                writer.where[last] = Place(name)
            writer.own(name, last)
        for name, group in layer.groups.items():
            length = len(group) * len(loop.runs)
            for run, nodes in enumerate(loop.runs):
                for position, offset in enumerate(group):
                    place = Place(lists[name], run * len(group) + position, length)
                    writer.where.setdefault(nodes[offset], place)

    def _varying(self, layer: Layer) -> list[str]:
        """The arguments that differ from run to run, as expressions in `i`. What has no place in a list gets one."""
        loop, writer = layer.loop, self.writer
        places = {number: [writer.place(v) for v in loop.columns[number].values] for number in layer.held}
        steps = {number: _even(found) for number, found in places.items()}
        even = sorted((n for n in layer.held if steps[n] is not None), key=lambda n: places[n][0][:2])  # type: ignore[arg-type, return-value]
        odd = [number for number in layer.held if steps[number] is None]
        items = turn([places[n][0] for n in even], [step for n in even if (step := steps[n]) is not None])
        if odd:
            name = writer.scope.name("given_layers")
            whole = [places[number][run] for run in range(len(loop.runs)) for number in odd]
            writer.add(f"{name} = ", listed(spread(whole)))
            writer.own(name, name)
            items += turn([Place(name, at) for at in range(len(odd))], [len(odd)] * len(odd))
        layer.held[:] = [*even, *odd]
        return items

    def _function(self, layer: Layer, dropped: set[fx.Node | str] | None) -> None:
        doc = f"{_which(layer.loop)}, in {self.name}." if _which(layer.loop) else f"A repeated part of {self.name}."
        wanted: Callable[[int], str] = lambda number: self._wanted(layer, number)  # noqa: E731
        self.functions += ["", "", *function(layer, self.shared, dropped, doc, wanted)]

    def body(self) -> list[str]:
        """The lines between the beginning and the return."""
        lists = {
            f"{layer.name} {name}"
            for layer in self.layers
            for name, group in layer.groups.items()
            if any(layer.run[offset] in self.results for offset in group)
        }
        return self.writer.lines({*self.results, *lists}, self.dropped)

    def returned(self, nodes: Sequence[fx.Node | None]) -> Item:
        """Several results, as a tuple."""
        items: list[Item] = []
        some: list[Place] = []
        for node in nodes:
            if node is not None:
                some.append(self.writer.place(node))
                continue
            items += [*spread(some), "None"]
            some = []
        return values([*items, *spread(some)])


def _even(places: Sequence[Place]) -> int | None:
    """How far places move from run to run in one list; None if they do not move evenly."""
    first, second = places[0], places[1]
    if first.index is None or second.index is None:
        return None
    step = second.index - first.index
    even = all(
        place.name == first.name and place.index == first.index + step * run for run, place in enumerate(places)
    )
    return step if even else None


def _which(loop: Loop) -> str:
    """`model.layers.0 to model.layers.31`: the layers of the user's that a loop runs."""
    from shardc.ir.facts import lowered

    def first(run: Sequence[fx.Node]) -> str:
        for node in run:
            parts = lowered(node).origin.module.split(".")
            numbers = [place for place, part in enumerate(parts) if part.isdigit()]
            if numbers:
                return ".".join(parts[: numbers[0] + 1])
        return ""

    one, other = first(loop.runs[0]), first(loop.runs[-1])
    return f"{one} to {other}" if one and other and one != other else one
