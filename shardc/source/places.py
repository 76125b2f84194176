"""Where the values of a function are: under names of their own, or at places of lists; and how several are written.

layers[1], layers[2], layers[3]                                *layers[1:4]
a[0], b[0], b[1], a[1], b[2], b[3], a[2], b[4], b[5]        *(x for i in range(3) for x in (a[i], *b[2 * i : ...]))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shardc.source.text import Item

LEAST = 3
"""Runs of places that are worth a comprehension."""

WIDEST = 64
"""Places that may differ within one turn of a comprehension."""


class Spot(NamedTuple):
    """A name, or with `at` a place of the list that is called so; `of` is the length of the list, if known."""

    name: str
    at: int | None = None
    of: int | None = None

    def __str__(self) -> str:
        return self.name if self.at is None else f"{self.name}[{self.at}]"


def spread(places: Sequence[Spot]) -> list[Item]:
    """Items of a list or tuple that has the values at `places`."""
    items: list[Item] = []
    at = 0
    while at < len(places):
        count, text = _best(places, at)
        items.append(text)
        at += count
    return items


def _best(places: Sequence[Spot], at: int) -> tuple[int, str]:
    """How many places from `at` on are written as one item, and the item."""
    if places[at].at is None:
        return 1, str(places[at])
    count = 1
    step = _step(places, at, 1) or 1
    while at + count < len(places) and _step(places, at + count - 1, 1) == step and step in (1, -1):
        count += 1
    turns = _turns(places, at, least=max(count, 3) + 1)
    if turns:
        return turns
    if count < LEAST:
        return 1, str(places[at])
    return count, f"*{_slice(places[at], step, count)}"


def _step(places: Sequence[Spot], at: int, stride: int) -> int | None:
    """How far two places of one list, `stride` apart, are from each other in that list."""
    if at + stride >= len(places):
        return None
    one, other = places[at], places[at + stride]
    if one.at is None or other.at is None or one.name != other.name:
        return None
    return other.at - one.at


def _slice(first: Spot, step: int, count: int) -> str:
    assert first.at is not None
    last = first.at + step * (count - 1)
    if step == 1:
        whole = first.at == 0 and first.of == count
        end = "" if first.of == last + 1 else str(last + 1)
        start = str(first.at) if first.at else ""
        return first.name if whole else f"{first.name}[{start}:{end}]"
    start = "" if first.of == first.at + 1 else str(first.at)
    end = str(last - 1) if last else ""
    return f"{first.name}[{start}:{end}:{step}]"


def _turns(places: Sequence[Spot], at: int, least: int) -> tuple[int, str] | None:
    """The places from `at` on as a comprehension, if it stands for at least so many."""
    best: tuple[int, int, list[int]] | None = None
    for width in range(1, min(WIDEST, (len(places) - at) // LEAST) + 1):
        steps = [_step(places, at + column, width) for column in range(width)]
        if None in steps:
            continue
        count = 2
        while at + (count + 1) * width <= len(places) and all(
            _step(places, at + (count - 1) * width + column, width) == steps[column] for column in range(width)
        ):
            count += 1
        if count >= LEAST and count * width >= least and (best is None or count * width > best[0] * best[1]):
            best = count, width, [step for step in steps if step is not None]
    if best is None:
        return None
    count, width, steps = best
    inner = turn([places[at + column] for column in range(width)], steps)
    if width == 1:
        return count, f"*({inner[0]} for i in range({count}))"
    return count * width, f"*(x for i in range({count}) for x in ({', '.join(inner)}{',' if len(inner) == 1 else ''}))"


def turn(first: Sequence[Spot], steps: Sequence[int]) -> list[str]:
    """The items of one turn of a loop over `i`: places of the first turn, and how far each moves from turn to turn."""
    items: list[str] = []
    at = 0
    while at < len(first):
        one, count = first[at], 1
        assert one.at is not None
        while at + count < len(first) and first[at + count].name == one.name and steps[at + count] == steps[at] \
                and first[at + count].at == one.at + count:  # fmt: skip
            count += 1
        if count == 1:
            items.append(f"{one.name}[{moving(one.at, steps[at])}]")
        else:
            ends = [moving(edge, steps[at]) for edge in (one.at, one.at + count)]
            gap = " " if any(" " in end for end in ends) else ""
            items.append(f"*{one.name}[{ends[0]}{gap}:{gap}{ends[1]}]")
        at += count
    return items


def moving(first: int, step: int) -> str:
    """`9 * i + 1`: the number of turn `i`."""
    if step == 0:
        return str(first)
    moved = "i" if abs(step) == 1 else f"{abs(step)} * i"
    if step < 0:
        return f"{first} - {moved}"
    return f"{moved} + {first}" if first else moved


def even(places: Sequence[Spot]) -> int | None:
    """How far places move from run to run in one list; None if they do not move evenly."""
    first, second = places[0], places[1]
    if first.at is None or second.at is None:
        return None
    step = second.at - first.at
    even = all(place.name == first.name and place.at == first.at + step * run for run, place in enumerate(places))
    return step if even else None
