"""A repeated layer as a function, and what a call of it takes and gives.

    def layer(x: Tensor, q_weight: Tensor, cos: Tensor) -> tuple[Tensor, list[Tensor]]:
        ...
        return x, [q, k]
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import fx

from shardc.ir.facts import lowered
from shardc.source.body import Shared, Writer, statements
from shardc.source.frees import Lives, Unit
from shardc.source.places import Place
from shardc.source.repetition import Loop, Own, Read
from shardc.source.text import Item, arguments, listed, tuple_of, values, written


@dataclass
class Layer:
    """How a loop calls its function. Columns are those of the loop: `given` are those that the function takes in one
    list, which it empties, so that each value is freed where its last reader is; `held` and `same` are arguments. With
    `state`, what is carried is in the list, too. `groups` are the offsets of what runs leave, list by list."""

    loop: Loop
    name: str
    state: bool
    given: list[int]
    held: list[int]
    same: list[int]
    groups: dict[str, list[int]]

    @property
    def carried(self) -> list[int]:
        return self.loop.carried

    @property
    def in_list(self) -> list[int]:
        """The columns that come in the list."""
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


def span_of(loop: Loop) -> list[tuple[int, int]]:
    """From node to node of the half, every run."""
    return [(loop.start + run * loop.size, loop.start + (run + 1) * loop.size) for run in range(len(loop.runs))]


def own_units(layer: Layer, lives: Lives) -> list[Unit]:
    """The storages that the function may free."""
    columns = [layer.loop.columns[column].values[0] for column in layer.in_list]
    outside = {c.values[0] for n, c in enumerate(layer.loop.columns) if n not in layer.in_list}
    theirs = {storage for node in outside for storage, _ in lives.storages(node)}
    mine = [n for n in (*columns, *layer.run) if all(storage not in theirs for storage, _ in lives.storages(n))]
    return lives.units(mine, span_of(layer.loop))


def carried_units(layer: Layer, lives: Lives) -> list[Unit]:
    """What the loop holds of every run while the next one runs, if what is carried is passed as an argument."""
    units: list[Unit] = []
    spans = span_of(layer.loop)
    for number in layer.carried:
        offset = layer.loop.columns[number].carried
        assert offset is not None
        values_of = [layer.loop.columns[number].values[0], *(run[offset] for run in layer.loop.runs[:-1])]
        late: list[tuple[int, int, int]] = []
        for value, (_, stop) in zip(values_of, spans, strict=True):
            for storage, size in lives.storages(value):
                end = lives.ends[storage] + 1
                if end < stop and size:
                    late.append((end, stop, size))
        units.append(Unit((), tuple(late)))
    return units


def function(
    layer: Layer, shared: Shared, dropped: Collection[fx.Node | str] | None, doc: str, carried_name: Callable[[int], str]
) -> list[str]:
    """The lines of the function. `dropped` are values that are deleted behind their last reader; None for all."""
    loop, run, writer = layer.loop, layer.run, Writer(shared, layer.run, layer=True)
    columns: dict[int, Place] = {}
    for number, column in enumerate(loop.columns):
        wanted = carried_name(number) if column.carried is not None else shared.naming.of(column.values[0], True)
        columns[number] = Place(writer.scope.name(wanted))
    taken = writer.scope.name("given") if layer.in_list else ""
    if taken:
        writer.add(values([str(columns[number]) for number in layer.in_list]), f" = {taken}")
        writer.add(f"{taken}.clear()", comment="nobody else holds them: each is freed with its last name")
        for number in layer.in_list:
            writer.own(columns[number].name, loop.columns[number].values[0])
    left = {*map(layer.carried_node, layer.carried), *(run[offset] for offset in loop.kept)}
    lines, offsets = statements(run), {node: offset for offset, node in enumerate(run)}
    for number, node in enumerate(lines):
        writer.begin()
        writer.header(node, lines[number:])
        read = loop.operands[offsets[node]]
        places = [
            writer.place(run[one.offset]) if isinstance(one, Own) else writer.read(columns[one.column]) for one in read
        ]
        own = bool(read) and isinstance(read[0], Own) and run[read[0].offset] not in left
        writer.call(node, places, own)
    body = writer.lines(left, dropped)
    return [*_head(layer, shared, columns, taken, doc), *body, *_leave(layer, writer)]


def _leave(layer: Layer, writer: Writer) -> list[str]:
    carried: list[Item] = [str(writer.place(layer.carried_node(number))) for number in layer.carried]
    lists = [listed([str(writer.place(layer.run[offset])) for offset in group]) for group in layer.groups.values()]
    items = [*([listed(carried)] if layer.state else carried), *lists]
    return written(["return ", tuple_of(items)], 1)


def _head(layer: Layer, shared: Shared, columns: Mapping[int, Place], taken: str, doc: str) -> list[str]:
    loop = layer.loop

    def annotated(number: int) -> str:
        return f"{columns[number]}: {shared.annotation(loop.columns[number].values[0])}"

    first = [] if layer.state else [annotated(number) for number in layer.carried]
    if taken:
        first.append(f"{taken}: {shared.list_of(loop.columns[number].values[0] for number in layer.in_list)}")
    parameters = [*first, *(annotated(number) for number in (*layer.held, *layer.same))]
    carried = [shared.annotation(layer.carried_node(number)) for number in layer.carried]
    state = [shared.list_of(map(layer.carried_node, layer.carried))] if layer.state else carried
    lists = [shared.list_of(layer.run[offset] for offset in group) for group in layer.groups.values()]
    made = [*state, *lists]
    returns = made[0] if len(made) == 1 else f"tuple[{', '.join(made)}]" if made else "None"
    return [
        *written([f"def {layer.name}", arguments(parameters), f" -> {returns}:"], 0),
        f'    """{doc}"""',
    ]


def modules_of(layer: Layer) -> list[str]:
    """The user's modules from which the function comes, in order."""
    return [module for node in layer.run if (module := lowered(node).origin.module)]
