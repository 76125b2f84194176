"""Forward and backward: straight lines, loops over repeated layers, and lists of what their runs read and leave."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import fx

from shardc.source.between import Found, loops_among
from shardc.source.body import NoPlace, Shared, Writer, alike, statements
from shardc.source.dropping import TooLong, by_last_reader, dropped_early
from shardc.source.frees import Holding, Lives
from shardc.source.layers import MADE, Function, Layer, Stretch, layer_names, layer_of
from shardc.source.naming import Scope, layer_name
from shardc.source.places import Spot, even, spread, turn
from shardc.source.repetition import Loop, LoopPlace, Outer, Own, key_of, operands_of
from shardc.source.shared_ends import share_ends
from shardc.source.taken import Taken, read_on, taken
from shardc.source.text import Item, arguments, listed, tuple_of, values

LEAST_GIVEN = 4
"""Arguments in a row that loops read, which get one list instead of names."""


class Refused(Exception):
    """A loop cannot be written as one: `half` and `start` say which. `apart`: it may be if what it leaves is in several
    lists."""

    def __init__(self, half: str, loop: Loop, apart: bool = False) -> None:
        super().__init__(half, loop.start)
        self.loop, self.apart = (half, loop.start), apart


class Half:
    """Writes one half. `results` are the values that it leaves; `kept` those of them that backward reads."""

    def __init__(
        self,
        name: str,
        nodes: Sequence[fx.Node],
        results: Iterable[fx.Node | None],
        kept: Iterable[fx.Node],
        shared: Shared,
        held: Holding | None,
        given: set[fx.Node],
        loops: bool,
        refused: Collection[LoopPlace] = (),
        apart: Collection[LoopPlace] = (),
    ) -> None:
        self.name, self.shared, self.held = name, shared, held
        self.results = {node: place for place, node in enumerate(results) if node is not None}
        self.kept = set(kept)
        self.found = loops_among(nodes, self.results, shared.mesh) if loops else Found([], nodes, {})
        self.loops = [loop for loop in self.found.loops if (name, loop.start) not in refused]
        self.apart = {start for half, start in apart if half == name}
        # a run that ends early may leave what is read much later
        self.loops = [replace(loop, rest=(), reads=()) if loop.start in self.apart else loop for loop in self.loops]
        self.nodes = self.found.nodes
        self.lives = Lives(self.nodes, set(self.results), given, held, name, self.found.behind)
        inside = {node for loop in self.loops for run in loop.every for node in run}
        self.inline = [node for node in nodes if node not in inside]
        self.writer = Writer(shared, self.inline, layer=False)
        self.layers: list[Layer] = []
        self.functions: list[str] = []

    def taken(self, forward: Half | None, saved: Sequence[fx.Node]) -> list[Taken]:
        """The lists of saved values that loops may take from: each value is read in one run alone."""
        where = forward.writer.where if forward else {}
        self.loops[:] = [read_on(loop, where, set(saved)) for loop in self.loops]
        return taken(self.loops, self.lives, where, set(saved))

    # writing

    def write(self, takes: Sequence[Taken]) -> None:
        """Write everything but the beginning and the return. Raises Refused for a loop that cannot be written."""
        try:
            self._write(takes)
        except TooLong as error:
            split = error.loop.start not in self.apart and MADE in self._groups(error.loop)
            raise Refused(self.name, error.loop, split) from error

    def _write(self, takes: Sequence[Taken]) -> None:
        self.layers += [self._layer(loop, [one for one in takes if one.loop is loop]) for loop in self.loops]
        share_ends(self.layers, partial(key_of, mesh=self.shared.mesh), self.shared.annotation, self._may_stay)
        for layer in self.layers:
            self._called(layer)
        dropped = dropped_early(self.lives, self.layers, [*self.inline, *self.writer.where])
        self._name_carried()
        lines, at = statements(self.inline), 0
        for number, loop in enumerate([*self.loops, None]):
            stop = len(self.nodes) if loop is None else loop.start
            first = at
            while at < len(lines) and self.lives.place[lines[at]] < stop:
                at += 1
            self._straight(lines[first:at])
            if loop is not None:
                layer, between = self.layers[number], dict[int, list[fx.Node]]()
                while at < len(lines) and (run := self.found.run_before(lines[at], loop)) is not None:
                    between.setdefault(run, []).append(lines[at])
                    at += 1
                try:
                    self._loop(layer, [one for one in takes if one.loop is loop], between)
                    self._functions(layer, dropped)
                except NoPlace as error:
                    raise Refused(self.name, loop) from error
        self.dropped = dropped

    def _straight(self, lines: Sequence[fx.Node]) -> None:
        """The lines between two loops."""
        at = 0
        while at < len(lines):
            if count := alike(itertools.islice(lines, at, None), self.writer.where):
                self.writer.begin()
                self.writer.each(lines[at : at + count], "grads" if lines[at] in self.results else "views")
            else:
                self._line(lines[at], itertools.islice(lines, at, None))
            at += count or 1

    def _name_carried(self) -> None:
        """Call what loops begin with as they call what they carry, if nobody else reads it."""
        for layer in self.layers:
            values = [layer.loop.columns[number].values[0] for number in layer.carried]
            if not layer.state and len(values) == 1 and self._alone(values[0], layer.loop):
                self.writer.wanted[values[0]] = self._wanted(layer, layer.carried[0])

    def _alone(self, value: fx.Node, loop: Loop) -> bool:
        """Whether a value is made here, and read by nothing behind the loop that begins with it."""
        mine = value in self.writer.here or any(value in one.runs[-1] for one in self.loops)
        return mine and self.found.behind.keys().isdisjoint(value.users) and self.lives.last(value) < loop.stop

    def _line(self, node: fx.Node, following: Iterable[fx.Node]) -> None:
        operands = operands_of(node)
        first = operands[0] if operands else None
        if first is not None and self._at_once(node) and self.writer.nest(node, lambda: self.writer.place(first)):
            return
        self.writer.begin()
        self.writer.header(node, following)
        own = first in self.writer.here and first not in self.results
        self.writer.call(node, lambda: list(map(self.writer.place, operands)), own)

    def _at_once(self, node: fx.Node) -> bool:
        """Whether no loop runs before a value is read for the last time."""
        place, last = self.lives.place[node], self.lives.last(node)
        return not any(place < loop.start <= last for loop in self.loops)

    def _layer(self, loop: Loop, takes: Sequence[Taken]) -> Layer:
        groups = self._groups(loop)
        if loop.start in self.apart and MADE in groups:
            groups |= by_last_reader(loop, groups.pop(MADE), self.lives)
        # gradients in the order in which they are returned: one slice of the list then has all of a run
        end = len(loop.rest) or loop.size
        groups.get("grads", []).sort(key=lambda offset: (offset >= end, self.results.get(loop.runs[0][offset], 0)))

        def read_on(node: fx.Node) -> bool:
            return node in self.results or any(self.lives.place.get(user, -1) >= loop.stop for user in node.users)

        given, later = ([n for one in takes if one.later is late for n in one.columns] for late in (False, True))
        layer = layer_of(loop, given, later, groups, read_on)
        runs = {self.found.run_before(node, loop) for node in self.found.behind} - {None}
        ends = sorted(run + 1 for run in runs if run is not None)
        layer.stretches = list(itertools.pairwise(dict.fromkeys([0, *ends, len(loop.runs)])))
        return layer

    def _groups(self, loop: Loop) -> dict[str, list[int]]:
        """The offsets of what runs leave, list by list."""
        groups: dict[str, list[int]] = {}
        for offset in loop.kept:
            runs = {run[offset] for run in loop.runs}
            name = "saved" if runs & self.kept else "grads" if runs & self.results.keys() else MADE
            groups.setdefault(name, []).append(offset)
        return groups

    def _called(self, layer: Layer) -> None:
        """Give the functions of a layer their names."""
        name = layer_name(layer.modules())
        for part in layer.parts:
            if layer.twin is not None and part is layer.parts[-1]:
                part.name = layer.twin.parts[-1].name
                continue
            wanted = name if self.name == "forward" else f"{name}_{self.name}"
            part.name = Scope(self.shared.taken).name(wanted if part is layer.parts[0] else f"{wanted}_end")
            self.shared.taken.add(part.name)
            self.writer.scope.taken.add(part.name)

    def _may_stay(self, layer: Layer, offsets: Sequence[int]) -> bool:
        """Whether values may stay until their run ends."""
        whole = [(layer.loop.start + run * layer.loop.size, layer.loop.start + (run + 1) * layer.loop.size)
                 for run in range(len(layer.loop.runs))]  # fmt: skip
        return all(map(self.lives.fits, self.lives.units([layer.run[offset] for offset in offsets], whole)))

    def _loop(self, layer: Layer, takes: Sequence[Taken], aside: Mapping[int, Sequence[fx.Node]]) -> None:
        """Write a loop; `aside` has by its number what stands behind a run."""
        loop, writer = layer.loop, self.writer
        writer.begin()
        carried = [self._carried(layer, number) for number in layer.carried]
        lists = {name: writer.scope.name(name.split()[0]) for name in layer.groups}
        state = writer.scope.name("state") if layer.state else ""
        if state:
            initial = [writer.place(loop.columns[number].values[0]) for number in layer.carried]
            writer.add(f"{state} = ", listed(map(str, initial)))
            writer.begin()  # where the names may be deleted

        def begin(number: int) -> None:
            for name in lists:
                if number and len(layer.lists(name)) == 1:
                    continue
                lists[name] = lists[name] if not number else writer.scope.name(name.split()[0])
                kinds = self.shared.list_of(layer.run[offset] for offset in layer.groups[name])
                writer.add(f"{lists[name]}: {kinds} = []")
                writer.own(lists[name], layer.list_of(name, number))
                self._left(layer, name, number, lists[name])

        begin(0)
        if not state:
            for number, name in zip(layer.carried, carried, strict=True):
                initial = writer.place(loop.columns[number].values[0])
                if str(initial) != name:
                    writer.add(f"{name} = {initial}")
        self._varying(layer)
        left = {name: writer.scope.name({"saved": "kept"}.get(name, f"new_{name.split()[0]}")) for name in lists}
        between = writer.scope.name("between") if len(layer.parts) > 1 else ""
        state_or = [state] if state else carried
        from_lists, from_lists_later = (
            [f"take({one.name}, {len(one.columns)})" for one in takes if one.later is late] for late in (False, True)
        )
        given = " + ".join([*([f"take({state}, {len(carried)})"] if state else []), *from_lists])
        if given or from_lists_later:
            self.shared.used.add("take")

        def call(part: Stretch, run: int | None) -> None:
            first = [*([] if state else carried), *([given] if given else [])]
            first = first if part is layer.parts[0] else [between]
            same = [str(writer.place(loop.columns[number].values[0])) for number in part.same]
            passed = [*first, *self._turn(part, run), *same]
            targets = [*(state_or if part is layer.parts[-1] else [between]), *(left[name] for name in part.groups)]
            made: list[Item] = [tuple_of(targets), " = "] if targets else []
            for one in from_lists_later if part is not layer.parts[0] else ():
                writer.add(f"{between} += {one}")
            writer.add(*made, part.name, arguments(passed))
            for name in part.groups:
                if idle := layer.left(part, name):
                    writer.add("del ", tuple_of([f"{left[name]}[{place}]" for place in idle]))
                writer.add(f"{lists[name]} += {left[name]}")

        def stretch(first: int, stop: int) -> None:
            if stop - first == 1 and aside:
                for part in layer.parts:
                    call(part, first)
                return
            span = f"{first}, {stop}" if first else str(stop)
            writer.add(f"for {turns} in range({span}):", comment=layer_names(loop.runs[first:stop]))
            writer.level += 1
            for part in layer.parts:
                call(part, None)
            writer.level -= 1

        turns = "i" if any(self._turn(part, None) != self._turn(part, 0) for part in layer.parts) else "_"
        for number, (first, stop) in enumerate(layer.stretches):
            if number:
                begin(number)
            stretch(first, stop)
            if lines := aside.get(stop - 1):
                self._straight(lines)
                writer.begin()
        if loop.rest:
            call(layer.parts[0], len(loop.runs))
        elif state:
            writer.add(values(carried), f" = {state}")
            writer.add(f"{state}.clear()")
        self._after(layer, carried)
        if loop.rest:
            self._go_on(layer, between)

    def _go_on(self, layer: Layer, between: str) -> None:
        """Names for what the run that does not end leaves to the lines behind it."""
        loop, writer, names = layer.loop, self.writer, list[str]()
        for one in layer.parts[0].after:
            node = loop.rest[one.offset] if isinstance(one, Own) else loop.reads[one.column]
            assert node is not None
            read = node in self.results or any(self.lives.place.get(user, -1) >= loop.stop for user in node.users)
            if node in writer.where and writer.where[node].at is None and isinstance(one, Own):
                names.append(f"_{writer.where[node]}")
            else:
                names.append(str(writer.name(node, ("" if read else "_") + self.shared.naming.of(node, False))))
        if names:
            writer.add(values(names), f" = {between}")
            writer.add(f"{between}.clear()")

    def _carried(self, layer: Layer, number: int) -> str:
        """What a loop calls a value that it carries: as what it starts from is called, if nobody else reads that."""
        column = layer.loop.columns[number]
        first = self.writer.where.get(column.values[0])
        if first is not None and first.at is None and not layer.state and self._alone(column.values[0], layer.loop):
            return first.name
        return self.writer.scope.name(self._wanted(layer, number))

    def _wanted(self, layer: Layer, number: int) -> str:
        if len(layer.carried) == 1:
            return "x" if self.name == "forward" else "grad"
        return self.shared.naming.of(layer.carried_node(number), True)

    def _after(self, layer: Layer, carried: Sequence[str]) -> None:
        """Where the values are that the last run carries on."""
        loop, writer = layer.loop, self.writer
        for number, name in zip(layer.carried, carried, strict=True):
            offset = loop.columns[number].carried
            assert offset is not None
            last = loop.runs[-1][offset]
            if layer.state and loop.rest:  # the call that does not end has taken it
                continue
            writer.where.setdefault(last, Spot(name))
            writer.own(name, last)

    def _left(self, layer: Layer, name: str, number: int, whole: str) -> None:
        """Where in a list the values will be that runs leave."""
        loop, group = layer.loop, layer.groups[name]
        first, stop = layer.lists(name)[number]
        nodes = [run[offset] for run in loop.every[first:stop] for offset in group if offset < len(run)]
        for place, node in enumerate(nodes):
            self.writer.where.setdefault(node, Spot(whole, place, len(nodes)))

    def _varying(self, layer: Layer) -> None:
        """Find where the arguments are that differ from run to run. What has no place in a list gets one. Raises
        TooLong where such a list would hold more than fits."""
        loop, writer = layer.loop, self.writer
        self.turns: dict[int, tuple[Spot, int]] = {}
        for part in layer.parts:
            for number in part.held:
                first = part is layer.parts[0]  # which alone is called for a run that does not end
                read = loop.values(number) if first else loop.columns[number].values
                some = [value for value in read if value is not None]
                places = [writer.place(value) for value in some]
                step = even(places)
                if step is None:
                    if not self.lives.may_stay(some, loop.start + sum(map(len, loop.every))):
                        raise TooLong(loop)
                    name = writer.scope.name("given_layers")
                    writer.add(f"{name} = ", listed(spread(places)))
                    writer.own(name, name)
                    self.turns[number] = Spot(name, 0), 1
                else:
                    self.turns[number] = places[0], step
            part.held.sort(key=lambda n: (self.turns[n][1], self.turns[n][0].name, self.turns[n][0].at))
        if layer.twin is not None:
            for numbers, its in ((layer.parts[-1].held, layer.twin.parts[-1].held),
                                 (layer.parts[-1].same, layer.twin.parts[-1].same)):  # fmt: skip
                numbers[:] = [b.column for n in its if isinstance(b := layer.pairs[Outer(n)], Outer)]

    def _turn(self, part: Stretch, run: int | None) -> list[str]:
        """The arguments that differ, in one run, or in run `i`."""
        found = [self.turns[number] for number in part.held]
        if run is None:
            return turn([place for place, _ in found], [step for _, step in found])
        return turn([p._replace(at=(p.at or 0) + step * run) for p, step in found], [0] * len(found))

    def _functions(self, layer: Layer, dropped: set[fx.Node | str] | None) -> None:
        doc = self._which([layer])
        for part in layer.parts:
            last = part is layer.parts[-1]
            if last and layer.twin is not None:
                continue
            told = (
                doc if part is layer.parts[0] else f"The end of {layer.parts[0].name}, which its last call is without."
            )
            if last and layer.shares:
                told = self._which([layer, *(one for one in self.layers if one.twin is layer)])
                told = told if part is layer.parts[0] else f"The end of {told}"
            one = Function(layer, part, self.shared, lambda number: self._wanted(layer, number))
            self.functions += ["", "", *one.lines(dropped, told)]

    def _which(self, layers: Sequence[Layer]) -> str:
        """`model.layers.0 to model.layers.31, in forward.`"""
        named = [one for layer in layers if (one := layer_names(layer.loop.runs))]
        return f"{' and '.join(named)}, in {self.name}." if named else f"A repeated part of {self.name}."

    def body(self) -> list[str]:
        """The lines between the beginning and the return."""
        lists = {
            layer.list_of(name)
            for layer in self.layers
            for name, group in layer.groups.items()
            if any(run[offset] in self.results for run in layer.loop.runs for offset in group)
        }
        return self.writer.lines({*self.results, *lists}, self.dropped)

    def returned(self, nodes: Sequence[fx.Node | None]) -> Item:
        """Several results, as a tuple."""
        items: list[Item] = []
        some: list[Spot] = []
        for node in nodes:
            if node is not None:
                some.append(self.writer.place(node))
                continue
            items += [*spread(some), "None"]
            some = []
        return values([*items, *spread(some)])
