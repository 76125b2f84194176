"""What the search is made of: tables without repetitions, forests, networks of few values, spliced choices."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from shardc.solver import tuning
from shardc.solver.bounds.bound import Bound
from shardc.solver.bounds.distinct import Table
from shardc.solver.capacity import Frontier
from shardc.solver.exact.active import ActiveSet
from shardc.solver.exact.forest import descend, step
from shardc.solver.exact.search import Search
from shardc.solver.loads import Load, Loads
from shardc.solver.problem import CostTerms, Problem, evaluate
from shardc.solver.solve import solve


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("roughly", [False, True])
def test_messages_are_those_of_the_whole_table(seed: int, roughly: bool) -> None:
    rng = np.random.default_rng(seed)
    small = rng.random((7, 9))
    small[rng.random(small.shape) < 0.2] = np.inf
    small[0], small[:, 0] = 1.0, 2.0  # no row or column without a finite entry
    whole = small[np.ix_(rng.integers(0, 7, 80) * (seed > 0), rng.integers(0, 9, 70))]  # seed 0: all rows are one
    table = Table(whole, roughly=roughly)
    assert table.small.size <= small.size < whole.size
    rows, columns = rng.random(80), rng.random(70)
    digits = 1e-6 if roughly else 0.0
    np.testing.assert_allclose(table.to_second(rows), (whole + rows[:, None]).min(axis=0), rtol=digits)
    np.testing.assert_allclose(table.to_first(columns), (whole + columns).min(axis=1), rtol=digits)
    assert table.to_second(rows).dtype == np.float64


def test_a_table_without_repetitions_stays_as_it_is() -> None:
    whole = np.random.default_rng(0).random((60, 50))
    assert Table(whole).small is whole and Table(np.ones((60, 50)), look=False).small.shape == (60, 50)


def random_network(count: int, density: float, seed: int, values: int = 4) -> Problem:
    """A random tree, and more edges."""
    rng, problem = np.random.default_rng(seed), Problem()
    for v in range(count):
        problem.add_variable(f"v{v}", rng.random(values))
        near = {int(rng.integers(v))} if v else set[int]()
        near |= {u for u in range(v) if rng.random() < density}
        for u in near:
            problem.add_edge(u, v, rng.random((values, values)))
    return problem


@pytest.mark.parametrize("seed", range(5))
def test_on_a_tree_one_forest_finds_the_optimum(seed: int) -> None:
    problem = random_network(7, 0.0, seed)
    best = min(evaluate(problem, choice) for choice in itertools.product(range(4), repeat=7))
    found = step(Bound(problem.unary, problem.edges), [0] * 7, seed)
    assert evaluate(problem, found) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_forests_never_make_a_choice_worse(seed: int) -> None:
    problem = random_network(30, 0.1, seed)
    bound, choice = Bound(problem.unary, problem.edges), [seed % 4] * 30
    for turn in range(6):
        better = step(bound, choice, turn)
        assert evaluate(problem, better) <= evaluate(problem, choice) + 1e-12
        choice = better
    assert evaluate(problem, descend(bound, [0] * 30)) < evaluate(problem, [0] * 30)


def test_a_network_of_few_values_costs_what_the_whole_does() -> None:
    problem = random_network(6, 0.5, 0, values=40)
    active = ActiveSet([np.arange(40) % 2 == v % 2 for v in range(6)])
    small, inside = active.problem(problem), [3, 0, 19, 7, 7, 7]
    assert active.outside(inside) == [6, 1, 38, 15, 14, 15]
    assert evaluate(small, inside) == evaluate(problem, active.outside(inside))


@pytest.mark.parametrize("turning", [0.0, 0.05])
def test_where_all_layers_turn_at_one_price_the_bound_lies_between_two_of_them(
    turning: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer is fast and large, or slow and small, and it costs more where the two meet: no price asks it of some
    layers only, and no part can change alone."""
    monkeypatch.setattr(tuning, "BRANCHED_PAIRS_CAPACITY", 0)  # deep networks are too large to branch over
    monkeypatch.setattr(tuning, "BRANCHED_PAIRS_WIDE_GAP", 0)
    layers, problem, held = 40, Problem(), list[Load]()
    link = np.array([[0.0, turning], [turning, 0.0]])
    for v in range(layers):
        problem.add_variable(f"layer {v}", np.array([1.0, 2.0]))
        if v:
            problem.add_edge(v - 1, v, link)
        held.append(Load(v, None, np.array([10.0, 1.0]), 0, 0))
    frontier = Frontier(problem, Loads(1, held))
    assert frontier.warm_start.fold is not None
    found = frontier.within(200.0, 20.0)
    fast = (200 - layers) // 9
    assert found.cost == pytest.approx(2 * layers - fast + turning)
    assert math.isfinite(found.lower_bound) and found.gap <= 0.02 * found.cost


@pytest.mark.parametrize("seed", range(4))
def test_terms_are_those_that_are_evaluated(seed: int) -> None:
    """And what changes part by part is what changes in all."""
    problem, rng = random_network(12, 0.1, seed), np.random.default_rng(seed)
    before, after = rng.integers(0, 4, 12).tolist(), rng.integers(0, 4, 12).tolist()
    terms = CostTerms.of(problem)
    assert math.fsum(terms.at(after).tolist()) == evaluate(problem, after)
    alone = [Load(v, None, cost, v % 5, v % 5 + 3) for v, cost in enumerate(problem.unary)]
    both = [Load(u, v, table, v % 3, u % 4 + 3) for (u, v), table in problem.edges.items()]
    loads = Loads(9, [*alone, *both])
    part = np.where(np.array(before) == after, -1, 0)  # one part: its terms are all that change
    assert part.max() == 0
    assert np.array_equal(terms.parts(part) == 0, [part[v] == 0 for v in range(12)] + [
        max(part[u], part[v]) == 0 for u, v in problem.edges])  # fmt: skip
    changes = list(loads.changes(before, after, part))
    np.testing.assert_allclose(changes, [loads.timeline(after) - loads.timeline(before)], atol=1e-12)
    assert list(loads.changes(before, before, np.full(12, -1))) == []


def test_the_smallest_plan_is_the_cheapest_of_its_size() -> None:
    problem = Problem()
    problem.add_variable("v", np.array([3.0, 2.0, 1.0]))
    frontier = Frontier(problem, Loads(1, [Load(0, None, np.array([1.0, 1.0, 5.0]), 0, 0)]))
    for value in range(3):
        frontier.know(solve(problem), [value])
    assert frontier.smallest().choice == [1]


@pytest.mark.parametrize("seed", range(4))
def test_a_draft_adds_no_triplets_and_proves_what_it_says(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frustrated cycles, which sweeps do not close, and no elimination, which would."""
    problem = random_network(10, 0.6, seed)
    best = solve(problem, certify=False)
    monkeypatch.setattr(Search, "_eliminated", lambda *_: False)
    whole = solve(problem, certify=False)
    assert best.exact and whole.exact and whole.cost == pytest.approx(best.cost)
    monkeypatch.setattr(Search, "_tightened", None)
    draft = solve(problem, certify=False, draft=True)
    assert evaluate(problem, draft.choice) == draft.cost
    assert draft.lower_bound < best.cost * (1.0 - 1e-6) and best.cost <= draft.cost * (1.0 + 1e-9)


def test_a_mixture_of_points_within_the_capacity_keeps_it_everywhere() -> None:
    """The fast choice has its peak at the first position, the slow one fits: only mixtures of both are too large at the
    second. A multiplier there proves 18; at the first alone, it would prove 15."""
    problem = Problem()
    problem.add_variable("v", np.array([10.0, 20.0]))
    held = [Load(0, None, np.array([20.0, 0.0]), 0, 0), Load(0, None, np.array([18.0, 8.0]), 1, 1)]
    frontier = Frontier(problem, Loads(2, held))
    for value in (0, 1):
        frontier.know(solve(problem), [value])
    multipliers, value = frontier.dual.next(10.0, 1e4)
    assert value == pytest.approx(18.0)
    assert multipliers == {1: pytest.approx(1.0)}
