"""Plans within a bound on memory against brute force on small networks."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from shardc.errors import InfeasibleError
from shardc.solver.capacity import Frontier
from shardc.solver.loads import Load, Loads
from shardc.solver.problem import Problem, evaluate
from shardc.solver.proof.certificate import check_within
from shardc.solver.solve import solve

LENGTH = 6


def instance(seed: int) -> tuple[Problem, Loads]:
    """A random network of up to 6 variables, some pairs forbidden, and what it holds over a schedule."""
    rng = np.random.default_rng(seed)
    count, sizes = int(rng.integers(2, 7)), rng.integers(2, 4, size=7)
    problem = Problem()
    for v in range(count):
        problem.add_variable(f"v{v}", rng.random(sizes[v]))
        for u in range(v):
            if rng.random() < 0.6:
                table = rng.random((sizes[u], sizes[v]))
                table[rng.random(table.shape) < 0.1] = np.inf
                problem.add_edge(u, v, table)
    held: list[Load] = []
    for _ in range(int(rng.integers(2, 12))):
        start = int(rng.integers(LENGTH))
        end = int(rng.integers(start, LENGTH))
        one, other = sorted(int(v) for v in rng.choice(count, 2, replace=False))
        if rng.random() < 0.5:
            held.append(Load(one, None, rng.integers(0, 9, size=sizes[one]).astype(float), start, end))
        else:
            held.append(Load(one, other, rng.integers(0, 9, (sizes[one], sizes[other])).astype(float), start, end))
    return problem, Loads(LENGTH, held)


def brute_force(problem: Problem, loads: Loads) -> list[tuple[float, float]]:
    """The cost and the peak of every choice that is allowed."""
    every = itertools.product(*(range(len(cost)) for cost in problem.unary))
    found = [(evaluate(problem, choice), float(loads.timeline(choice).max())) for choice in every]
    return [(cost, peak) for cost, peak in found if math.isfinite(cost)]


@pytest.mark.parametrize("seed", range(300))
def test_within_a_bound(seed: int) -> None:
    """At three bounds between the least and the greatest peak, asked one after the other of one frontier."""
    problem, loads = instance(seed)
    every = brute_force(problem, loads)
    if not every:
        with pytest.raises(InfeasibleError):
            Frontier(problem, loads).within(1.0, 20.0)
        return
    peaks = sorted({peak for _, peak in every})
    frontier = Frontier(problem, loads)
    for bound in {peaks[0], peaks[len(peaks) // 3], peaks[-1]}:
        if not bound:
            continue
        best = min(cost for cost, peak in every if peak <= bound)
        found = frontier.within(bound, 20.0)
        assert evaluate(problem, found.choice) == found.cost
        assert loads.timeline(found.choice).max() <= bound
        assert found.lower_bound <= best + 1e-6
        assert found.cost == pytest.approx(best, rel=1e-6)
    if peaks[0] > 1.0:
        with pytest.raises(InfeasibleError, match="smallest peak"):
            frontier.within(peaks[0] - 0.5, 20.0)


@pytest.mark.parametrize("seed", range(20))
def test_priced_is_cost_plus_what_is_held(seed: int) -> None:
    problem, loads = instance(seed)
    multipliers = {0: 0.5, 3: 0.25, LENGTH - 1: 1.0}
    penalised = loads.lagrangian(problem, multipliers)
    for choice in itertools.islice(itertools.product(*(range(len(cost)) for cost in problem.unary)), 50):
        held = loads.timeline(choice)
        expected = evaluate(problem, choice) + sum(price * held[at] for at, price in multipliers.items())
        assert evaluate(penalised, choice) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(40))
def test_multipliers_and_a_certificate_prove_what_they_say(seed: int) -> None:
    """Worked out by code that shares nothing with the search, and never more than the best choice within the bound."""
    problem, loads = instance(seed)
    every = brute_force(problem, loads)
    if not every:
        return
    peaks = sorted({peak for _, peak in every})
    bound = max(peaks[len(peaks) // 4], 1.0)
    best = min(cost for cost, peak in every if peak <= bound)
    multipliers = {0: 0.01 * (seed % 3), 2: 0.02, LENGTH - 1: 0.005}
    found = solve(loads.lagrangian(problem, multipliers))
    proved = check_within(problem, loads.all, multipliers, bound, found.certificate)
    assert proved <= best
    assert proved == pytest.approx(found.lower_bound - bound * sum(multipliers.values()), abs=1e-6)
    with pytest.raises(ValueError, match="not negative"):
        check_within(problem, loads.all, {0: -0.1}, bound, found.certificate)


def test_what_two_plans_differ_in_is_taken_part_by_part() -> None:
    """Ten equal layers that could all be faster at the same price; there is room for three of them."""
    problem = Problem()
    held: list[Load] = []
    cost, size = np.array([2.0, 1.0]), np.array([0.0, 1.0])
    for v in range(10):
        problem.add_variable(f"layer {v}", cost)
        held.append(Load(v, None, size, 0, 0))
    found = Frontier(problem, Loads(1, held)).within(3.0, 20.0)
    assert found.cost == 17.0 and sum(found.choice) == 3
    assert found.lower_bound == pytest.approx(17.0)


@pytest.mark.parametrize("seed", range(12))
def test_a_looser_bound_never_gives_a_worse_plan_nor_proves_less_than_none(seed: int) -> None:
    """Every bound asked of a frontier of its own, so that none learns from another."""
    problem, loads = instance(seed)
    every = brute_force(problem, loads)
    if not every:
        return
    free = solve(problem, draft=True)
    before = math.inf
    for bound in sorted({peak for _, peak in every if peak})[::3]:
        frontier = Frontier(problem, loads)
        frontier.know(replace(free, lower_bound=-math.inf), free.choice)
        found = frontier.within(bound, 20.0)
        assert found.cost <= before + 1e-9
        assert found.lower_bound >= free.lower_bound - 1e-6
        before = found.cost


def test_what_is_proved_without_a_bound_counts_where_multipliers_prove_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multipliers that are far too large prove less than nothing."""
    problem, loads = instance(3)
    free = solve(problem, draft=True)
    frontier = Frontier(problem, loads)
    frontier.know(replace(free, lower_bound=-math.inf), free.choice)
    monkeypatch.setattr(frontier, "_drafted", lambda *_: {0: 1e3})
    capacity = loads.peak(free.choice)
    frontier._alternate(capacity, math.inf)
    assert frontier.dual.best(capacity).bound(capacity) < 0.0
    assert frontier.within(capacity, 20.0).lower_bound == pytest.approx(free.cost)
