"""Passes in compiled code do what those in numpy do."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from shardc.solver import tuning
from shardc.solver.bounds.bound import Bound
from shardc.solver.bounds.distinct import Table
from shardc.solver.bounds.flat import Flat
from shardc.solver.bounds.triplets import Groups
from shardc.solver.exact.forest import step


def network(seed: int, roughly: bool) -> Bound:
    """A chain with chords, of tables that repeat rows and columns, some of them shared, some with entries that are
    forbidden."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(40, 70, 12)
    shared: dict[tuple[int, int], Table] = {}

    def table(rows: int, columns: int) -> Table:
        small = rng.random((9, 7))
        small[rng.random(small.shape) < 0.2] = np.inf
        small[0], small[:, 0] = 1.0, 2.0
        whole: NDArray[np.float64] = small[np.ix_(rng.integers(0, 9, rows), rng.integers(0, 7, columns))]
        whole[0], whole[:, 0] = 1.5, 2.5
        return Table(whole if rng.random() < 0.7 else rng.random((rows, columns)), roughly=roughly)

    edges: dict[tuple[int, int], Table] = {}
    for v in range(1, len(sizes)):
        for u in {v - 1, int(rng.integers(v))}:
            shape = int(sizes[u]), int(sizes[v])
            shared[shape] = edges[u, v] = shared.get(shape) or table(*shape)
    return Bound([rng.random(size) for size in sizes], edges)


def in_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bound, "flat", lambda _: None)


def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(tuning, "COMPILED_EDGES", 0)


@pytest.mark.parametrize("roughly", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_sweeps_agree_to_the_last_bit(seed: int, roughly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = network(seed, roughly), network(seed, roughly)
    for _ in range(3):
        compiled(monkeypatch)
        lower = ours.sweep()
        in_numpy(monkeypatch)
        assert lower == theirs.sweep()
    compiled(monkeypatch)
    reduced = ours.reduced_costs()
    in_numpy(monkeypatch)
    for one, other in zip(reduced, theirs.reduced_costs(), strict=True):
        np.testing.assert_array_equal(one, other)
    for edge, (one, other) in ours.messages().items():
        np.testing.assert_array_equal(one, theirs.messages()[edge][0])
        np.testing.assert_array_equal(other, theirs.messages()[edge][1])


@pytest.mark.parametrize("seed", range(6))
def test_forests_choose_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = network(seed, roughly=False)
    choice = [0] * len(bound.unary)
    for turn in range(4):
        compiled(monkeypatch)
        found = step(bound, choice, turn)
        in_numpy(monkeypatch)
        assert bound.cost(found) == pytest.approx(bound.cost(step(bound, choice, turn)), rel=1e-12)
        choice = found


def test_tables_that_triplets_changed_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[float]] = []
    for way in (compiled, in_numpy):
        way(monkeypatch)
        bound = Bound([np.zeros(2)] * 3, {edge: np.eye(2) for edge in ((0, 1), (1, 2), (0, 2))})
        bound.sweep()
        more = bound.with_triplets([(0, 1, 2)], [Groups(np.arange(2)) for _ in range(3)], 3.0)
        found.append([more.sweep() for _ in range(20)])
        assert found[-1][-1] == pytest.approx(1.0)  # of three that would all differ, two are equal
        chosen = step(more, [0, 0, 0], 0)
        assert more.cost(chosen) == 1.0
    assert found[0] == found[1]


def test_only_large_networks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network(0, roughly=False).flat() is None
    compiled(monkeypatch)
    bound = network(0, roughly=False)
    flat = bound.flat()
    assert isinstance(flat, Flat)
    assert bound.flat() is flat
