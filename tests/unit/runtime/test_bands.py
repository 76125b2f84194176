"""Bands, counted pair by pair, and the order of a ring's steps."""

from __future__ import annotations

import itertools
import random

import pytest

from shardc.runtime import Part, VirtualMesh
from shardc.runtime.mesh.bands import Runs, hop, pairs, runs_of_parts, visits


def counted(rows: Runs, columns: Runs, causal: bool, window: int) -> int:
    places = ([place for start, length in runs for place in range(start, start + length)] for runs in (rows, columns))
    ahead = [i - j for i, j in itertools.product(*places)]
    return sum((not causal or n >= 0) and (not window or (n < window and (causal or -n < window))) for n in ahead)


def test_pairs() -> None:
    draw = random.Random(0)
    for _ in range(500):
        rows, columns = (tuple((draw.randrange(12), draw.randrange(7)) for _ in range(2)) for _ in range(2))
        causal, window = draw.random() < 0.5, draw.choice([0, 1, 2, 3, 5, 9])
        assert pairs(rows, columns, causal, window) == counted(rows, columns, causal, window)


@pytest.mark.parametrize("axes", [{"a": 4}, {"a": 2, "b": 3}, {"a": 3, "b": 2}])
@pytest.mark.parametrize(("size", "unit"), [(12, 1), (10, 1), (14, 2)])
def test_the_positions_of_parts_are_those_that_ranks_see(axes: dict[str, int], size: int, unit: int) -> None:
    part = Part(tuple(axes), size, unit)
    seen = VirtualMesh(axes).run(lambda: (part.start, part.valid), lambda _: ())
    assert runs_of_parts(size, tuple(axes), tuple(axes.values()), unit) == tuple((one,) for one in seen)


@pytest.mark.parametrize("counts", [(5,), (2, 3), (2, 2, 3), (1, 4)])
def test_a_ring_comes_to_every_part_along_one_axis_at_a_time(counts: tuple[int, ...]) -> None:
    parts = runs_of_parts(60, tuple("abcd"[: len(counts)]), counts)
    found = [one.offset for one in visits(parts, parts, counts, False, 0)]
    assert sorted(found) == list(itertools.product(*map(range, counts)))
    hops = [hop(one, other, counts) for one, other in itertools.pairwise(found)]
    assert all(len(along) == 1 and along[0][1] == 1 for along in hops)
    most = max(range(len(counts)), key=lambda axis: sum(along[0][0] == axis for along in hops))
    assert most == len(counts) - 1


@pytest.mark.parametrize(("causal", "window", "offsets", "most"), [
    (True, 0, [0, 1, 2, 3], [10, 16, 16, 16]),
    (True, 4, [0, 1], [10, 6]),
    (True, 6, [0, 1, 2], [10, 13, 1]),
    (False, 3, [0, 1, 3], [14, 3, 3]),
])  # fmt: skip
def test_steps_in_which_nobody_sees_a_key_are_left_out(
    causal: bool, window: int, offsets: list[int], most: list[int]
) -> None:
    """The slowest rank sets the time of every step."""
    parts = runs_of_parts(16, ("a",), (4,))
    found = visits(parts, parts, (4,), causal, window)
    assert [one.offset[0] for one in found] == offsets and [one.pairs for one in found] == most
