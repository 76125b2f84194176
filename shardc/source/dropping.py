"""What the functions of a half delete before they end: what the rank could not hold until then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from shardc.source.frees import Lives, Unit
from shardc.source.layers import MADE, Layer, carried_unit, own_units
from shardc.source.repetition import Loop


class TooLong(Exception):
    """A list of what runs of a loop take or leave would hold more than the plan says."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop.start)
        self.loop = loop


def by_last_reader(loop: Loop, offsets: Sequence[int], lives: Lives) -> dict[str, list[int]]:
    """A list for each place up to which what runs leave at these offsets is read: each is deleted there as a whole."""
    ends: dict[int, list[int]] = {}
    for offset in offsets:
        last = max(lives.last(run[offset]) for run in loop.every if offset < len(run))
        ends.setdefault(last, []).append(offset)
    return {f"{MADE} {end}": ends[end] for end in sorted(ends)}


def dropped_early(lives: Lives, layers: Sequence[Layer], named: Sequence[fx.Node]) -> set[fx.Node | str] | None:
    """What is deleted before its function ends, among what the runs of `layers` make and what is `named` in the half;
    None for everything. Says of each layer whether it carries its values in a list. Raises TooLong where lists would
    hold more than fits."""
    if lives.held is None:
        for layer in layers:
            layer.state = bool(layer.carried)
        return None
    units: list[Unit] = []
    for layer in layers:
        layer.state = not lives.fits(carried_unit(layer, lives))
        if layer.twin is not None and layer.state != layer.twin.state:  # one function gives what both carry
            layer.state = layer.twin.state = True
        units += _units(layer, lives)
    units += lives.units(named, [(0, len(lives.nodes))])
    dropped = _lists(lives, layers)
    for unit in sorted(units, key=lambda unit: unit.size):
        if not lives.fits(unit):
            dropped.update(unit.names)
    return dropped


def _units(layer: Layer, lives: Lives) -> list[Unit]:
    """What the functions of a layer hold; what the end of one with a twin holds, by the names of the twin."""
    kept = {offset for group in layer.groups.values() for offset in group}
    idle = {layer.run[o] for part in layer.parts for group in part.groups.values() for o in group if o not in kept}
    found: list[Unit] = []
    for part in layer.parts:
        units = [unit for unit in own_units(layer, part, lives) if idle.isdisjoint(unit.names)]
        if layer.twin is not None and part is layer.parts[-1]:
            units = [
                replace(one, names=tuple(layer.twins(n) for n in one.names if isinstance(n, fx.Node))) for one in units
            ]
        found += units
    return found


def _lists(lives: Lives, layers: Sequence[Layer]) -> set[fx.Node | str]:
    """The lists of what runs leave that are deleted behind their last reader. Raises TooLong where even then they
    would hold more than fits."""
    dropped: set[fx.Node | str] = set()
    for layer in layers:
        for name, group in layer.groups.items():
            for number, (first, stop) in enumerate(layer.lists(name)):
                made = [run[offset] for run in layer.loop.every[first:stop] for offset in group if offset < len(run)]
                if not _may_stay(made, lives):
                    if not _may_stay(made, lives, max(lives.last(node) for node in made) + 1):
                        raise TooLong(layer.loop)
                    dropped.add(layer.list_of(name, number))
    return dropped


def _may_stay(made: Sequence[fx.Node], lives: Lives, stop: int | None = None) -> bool:
    """Whether what a list has may stay until the node `stop`, or until the half ends."""
    end = len(lives.nodes) if stop is None else stop
    stays = [
        (lives.ends[storage] + 1, end, size)
        for node in made
        for storage, size in lives.storages(node)
        if lives.ends[storage] + 1 < end
    ]
    return lives.fits(Unit((), tuple(stays)))
