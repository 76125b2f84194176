"""Lists from which loops take what forward saved: each value is read in one run alone, and the list lets go of it.

for i in range(30):
    grad, new_grads = layer_backward(grad, take(saved, 16) + take(layers, 9))
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from shardc.source.frees import Lives
from shardc.source.places import Spot
from shardc.source.repetition import Loop

Places = Mapping[fx.Node, Spot]
"""Where values are in forward."""


@dataclass
class Taken:
    """A list of which a loop takes values for each run, from the end. `columns` are those of the loop. `later` are they
    taken if only the second function of a layer reads them, which does not run for a run that ends early."""

    wanted: str
    loop: Loop
    columns: list[int]
    later: bool = False
    name: str = ""

    @property
    def nodes(self) -> list[fx.Node]:
        """Its values, in order."""
        read = [self.loop.columns[n].values if self.later else self.loop.values(n) for n in self.columns]
        turns = list(zip(*read, strict=True))
        return [value for turn in reversed(turns) for value in turn if value is not None]


def taken(loops: Sequence[Loop], lives: Lives, where: Places, saved: Collection[fx.Node]) -> list[Taken]:
    """The lists that the loops of backward may take from, among what forward saved."""
    found: list[Taken] = []
    claimed = set[fx.Node]()
    for loop in loops:
        groups: dict[tuple[str, bool], list[int]] = {}
        for number, column in enumerate(loop.columns):
            if column.carried is not None or column.same or claimed.intersection(column.values):
                continue
            values = loop.values(number)
            later = values[-1] is None and loop.begins_at(number) >= len(loop.rest)
            values = values[:-1] if later else values
            if all(value in saved for value in values) and _read_within(loop, values, lives):
                claimed.update(column.values)
                place = where.get(column.values[0])
                name = place.name if place and place.at is not None else ""
                groups.setdefault((name, later), []).append(number)
        for (name, later), columns in groups.items():
            columns.sort(key=lambda number: _index(where, loop, number))
            found.append(Taken(name or "saved", loop, columns, later))
    return found


def read_on(loop: Loop, where: Places, saved: Collection[fx.Node]) -> Loop:
    """The loop with what the run that does not end would read further on: in lists of forward, the next in turn, if it
    is among what forward saved."""
    if not loop.rest:
        return loop
    at = {place: node for node, place in where.items() if place.at is not None and node in saved}
    found = list(loop.reads)
    for number, column in enumerate(loop.columns):
        if found[number] is None:
            one, two = (where.get(value) for value in column.values[-2:])
            if one and two and one.at is not None and two.at is not None and one.name == two.name:
                found[number] = at.get(two._replace(at=2 * two.at - one.at))
    return replace(loop, reads=tuple(found))


def _index(where: Places, loop: Loop, number: int) -> int:
    place = where.get(loop.columns[number].values[0])
    return place.at if place is not None and place.at is not None else number


def _read_within(loop: Loop, values: Sequence[fx.Node | None], lives: Lives) -> bool:
    """Whether every value of a column is read in its own run alone; that of a run that does not end, after it."""
    for run, value in enumerate(values):
        start = loop.start + run * loop.size
        stop = start + loop.size if run < len(loop.runs) else len(lives.nodes)
        if value is None or value in lives.results:
            return False
        if not all(start <= lives.place[user] < stop for user in value.users if user in lives.place):
            return False
    return True
