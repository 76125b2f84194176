"""Which selections are empty in the traces by which capture looks for code that branches on it.

selection    a b c d
first trace  - - - -      none is empty
others       x x - -      of any two selections there is a trace in which both are empty, and one each in which
             x - x -      only the one is, and only the other is: what hangs on one of them, or on two together,
             ...          is seen
             x x x x      all are
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ChooserName = tuple[str, int]
"""The module that first asks about what something has chosen, and how many others it has asked about before."""
Question = tuple[ChooserName, int]
"""What a question is about: what chooses, and one of the experts among which it does."""


@dataclass(frozen=True)
class EmptyCase:
    """What a trace is told: that these are empty. `number` is 0 in the first trace, where none is."""

    number: int = 0
    empty: frozenset[Question] = frozenset()


FIRST_TRACE = EmptyCase()


def cases(questions: Sequence[Question], wholes: Mapping[ChooserName, int]) -> list[EmptyCase]:
    """The cases besides the first. `wholes` says of what chooses among how many experts: these are never all empty.

    Where sets of traces are no part of one another, each selection is empty in one where another is not (Sperner).
    """
    count = 0
    while math.comb(count, count // 2) < len(questions):
        count += 1
    seed = 0
    while True:
        rows = _rows(questions, count + seed // 8, seed)
        rows = list(dict.fromkeys(_possible(row, wholes, place) for place, row in enumerate(rows)))
        if _shows_pairs(questions, rows, wholes):
            return [EmptyCase(number, row) for number, row in enumerate(rows, 1)]
        seed += 1


def _rows(questions: Sequence[Question], count: int, seed: int) -> list[frozenset[Question]]:
    """All, and `count` others: each question is in half of those, no two in the same."""
    halves = list(itertools.combinations(range(count), count // 2))
    pairs = list(zip(questions, random.Random(seed).sample(halves, len(questions)), strict=True))
    return [frozenset(questions), *(frozenset(one for one, rows in pairs if row in rows) for row in range(count))]


def _possible(row: frozenset[Question], wholes: Mapping[ChooserName, int], place: int) -> frozenset[Question]:
    for source, count in wholes.items():
        if all((source, expert) in row for expert in range(count)):
            row -= {(source, place % count)}
    return row


def _shows_pairs(
    questions: Sequence[Question], rows: Sequence[frozenset[Question]], wholes: Mapping[ChooserName, int]
) -> bool:
    """Whether any two questions are answered in all ways that there are."""
    table = np.array([[one in row for one in questions] for row in rows], np.int32).reshape(-1, len(questions))
    both, one = table.T @ table > 0, table.T @ (1 - table) > 0
    for place, (source, _) in enumerate(questions):
        if wholes.get(source) == 2:  # of two experts one has rows
            alike = [other == source for other, _ in questions]
            both[place, alike] = True
        if wholes.get(source) == 1:  # which has all rows
            both[place], one[place] = True, True
    one |= np.eye(len(questions), dtype=bool)
    ever = table.any(0) | np.array([wholes.get(source) == 1 for source, _ in questions], dtype=bool)
    return bool((both | ~np.outer(ever, ever)).all() and one.all() and ever.all())
