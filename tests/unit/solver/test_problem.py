"""The nouns of the solver: problems, certificates, and what they refuse."""

import itertools
import math

import numpy as np
import pytest

from shardc.errors import InfeasibleError
from shardc.solver.bounds.bound import Bound
from shardc.solver.bounds.triplets import Groups
from shardc.solver.exact.presolve import ReducedNetwork
from shardc.solver.pool import min_plus, undominated
from shardc.solver.problem import Problem, evaluate
from shardc.solver.proof.certificate import Certificate, Lender, check
from shardc.solver.solve import solve


def chain(n: int, d: int = 3) -> Problem:
    """Equal layers: one unary vector, one table."""
    rng = np.random.default_rng(0)
    cost, table = rng.random(d), rng.random((d, d))
    problem = Problem()
    for v in range(n):
        problem.add_variable(f"v{v}", cost)
        if v:
            problem.add_edge(v - 1, v, table)
    return problem


def test_edges_turn_and_add_up() -> None:
    problem = Problem()
    for name, size in (("a", 2), ("b", 3), ("c", 2)):
        problem.add_variable(name, np.zeros(size))
    table = np.arange(6.0).reshape(3, 2)
    problem.add_edge(1, 0, table)
    problem.add_edge(1, 0, table)
    problem.add_edge(1, 2, table)
    problem.add_edge(0, 0, np.array([[1.0, 9.0], [9.0, 2.0]]))
    assert np.array_equal(problem.edges[(0, 1)], 2 * table.T)
    assert problem.edges[(1, 2)] is table
    assert problem.unary[0].tolist() == [1.0, 2.0]
    assert evaluate(problem, [1, 2, 0]) == 2.0 + 2 * table[2, 1] + table[2, 0]


def test_shared_tables_stay_shared() -> None:
    problem = Problem()
    for v in range(6):
        problem.add_variable(f"v{v}", np.zeros(2))
    table = np.eye(2)
    for u, v in ((1, 0), (3, 2), (5, 4)):
        problem.add_edge(u, v, table)
        problem.add_edge(u, v, table)
    assert len({id(t) for t in problem.edges.values()}) == 1


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_bad_entries(bad: float) -> None:
    problem = chain(2)
    problem.unary[1] = np.array([0.0, bad, 0.0])
    with pytest.raises(ValueError, match="variable 'v1'"):
        solve(problem)


def test_wrong_shapes() -> None:
    problem = chain(2)
    with pytest.raises(ValueError, match=r"table \(2, 2\)"):
        problem.add_edge(0, 1, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="vector"):
        problem.add_variable("m", np.zeros((2, 2)))


def test_empty_and_infeasible() -> None:
    assert solve(Problem()).cost == 0.0
    problem = Problem()
    problem.add_variable("v", np.array([np.inf, np.inf]))
    with pytest.raises(InfeasibleError, match="'v'"):
        solve(problem)
    problem = Problem()  # three variables, two values, all different: consistent in every pair
    for v in range(3):
        problem.add_variable(f"v{v}", np.zeros(2))
    differ = np.where(np.eye(2) > 0, np.inf, 0.0)
    for u, v in ((0, 1), (1, 2), (0, 2)):
        problem.add_edge(u, v, differ)
    with pytest.raises(InfeasibleError):
        solve(problem)


def test_equal_layers_are_contracted_once() -> None:
    """Combs: every layer hangs a private pair of variables on the spine; the pool does not grow with their number."""

    def pool_size(layers: int) -> int:
        rng = np.random.default_rng(1)
        cost, table = rng.random(4), rng.random((4, 4))
        problem = Problem()
        for i in range(layers):
            u = problem.add_variable(f"u{i}", cost)
            v = problem.add_variable(f"v{i}", cost)
            w = problem.add_variable(f"w{i}", cost)
            for a, b in ((u, v), (v, w), (u, w)):
                problem.add_edge(a, b, table)
        network = ReducedNetwork(problem)
        network.shrink()
        assert not network.core().unary
        return len(network.pool.arrays)

    assert pool_size(3) == pool_size(40)


def test_ties_go_to_the_smallest_index() -> None:
    problem = Problem()
    for v in range(5):
        problem.add_variable(f"v{v}", np.full(3, 0.1))
        if v:
            problem.add_edge(v - 1, v, np.full((3, 3), 0.3))
    assert solve(problem).choice == [0] * 5


def test_min_plus_and_dominance() -> None:
    rng = np.random.default_rng(2)
    a, middle, b = rng.random((5, 3)), rng.random(5), rng.random((5, 4))
    assert np.array_equal(min_plus(a, middle, b), (a.T[:, :, None] + middle[:, None] + b[None]).min(axis=1))
    table = np.array([[1.0, np.inf], [1.0, 2.0], [0.0, 3.0], [1.0, 2.0]])
    assert undominated(np.array([0.0, 0.0, 0.5, 0.0]), [table]).tolist() == [False, True, True, False]


def test_certificates_are_checked() -> None:
    problem = chain(4)
    solution = solve(problem)
    assert 0 <= solution.cost - check(problem, solution.certificate) <= 1e-8
    assert check(problem, Certificate({})) < solution.cost
    zeros = np.zeros(3)
    with pytest.raises(ValueError, match="no edge"):
        check(problem, Certificate({(0, 3): (zeros, zeros)}))
    with pytest.raises(ValueError, match="fit"):
        check(problem, Certificate({(0, 1): (zeros, np.zeros(2))}))
    with pytest.raises(ValueError, match="finite"):
        check(problem, Certificate({(0, 1): (zeros, np.array([0.0, np.inf, 0.0]))}))
    rng = np.random.default_rng(3)
    for _ in range(50):  # whatever the messages are, the bound is a bound
        wild = Certificate({edge: (rng.normal(size=3), rng.normal(size=3)) for edge in problem.edges})
        assert check(problem, wild) <= solution.cost


def test_triplets_of_certificates_are_checked() -> None:
    problem, index = chain(4), np.arange(3)
    loans = (np.zeros((3, 3)), np.zeros((3, 3)), np.zeros((3, 3)))

    def lender(**changes: object) -> Certificate:
        fields = {"variables": (0, 1, 2), "groups": (index, index, index), "loans": loans}
        return Certificate({(0, 2): (np.zeros(3), np.zeros(3))}, (Lender(**{**fields, **changes}),))  # type: ignore[arg-type]

    assert check(problem, lender()) == pytest.approx(check(problem, Certificate({})))
    for variables in ((0, 2, 1), (1, 1, 2), (2, 3, 4), (-1, 0, 1)):
        with pytest.raises(ValueError, match="ascending"):
            check(problem, lender(variables=variables))
    for group in (np.arange(2), np.array([0, 1, 3]), np.array([0, -1, 1]), np.zeros(3)):
        with pytest.raises(ValueError, match="groups"):
            check(problem, lender(groups=(index, group, index)))
    for loan in (np.full((3, 3), np.inf), np.zeros(3), np.zeros((3, 3), dtype=np.float32)):
        with pytest.raises(ValueError, match="loan"):
            check(problem, lender(loans=(loans[0], loan, loans[2])))
    with pytest.raises(ValueError, match="loans"):
        check(problem, lender(loans=(loans[0], np.zeros((4, 3)), loans[2])))
    with pytest.raises(ValueError, match="no edge"):
        check(problem, Certificate({(0, 2): (np.zeros(3), np.zeros(3))}))


def test_time_limit_still_bounds() -> None:
    rng = np.random.default_rng(5)
    problem = Problem()
    for v in range(30):
        problem.add_variable(f"v{v}", rng.random(8))
        for u in range(v):
            problem.add_edge(u, v, rng.random((8, 8)))
    solution = solve(problem, time_limit=0.3)
    assert not solution.exact
    assert solution.lower_bound < solution.cost == evaluate(problem, solution.choice)
    assert check(problem, solution.certificate) <= solution.lower_bound


def test_many_sweeps_with_triplets_neither_drift_nor_prove_too_much() -> None:
    """Constants that stay in messages are lent on from sweep to sweep, and grow until nothing else is left."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        problem = Problem()
        for v in range(5):
            problem.add_variable(f"v{v}", rng.random(4))
            for u in range(v):
                problem.add_edge(u, v, rng.random((4, 4)) * rng.choice([0.1, 1.0, 10.0]))
        optimum = min(evaluate(problem, choice) for choice in itertools.product(range(4), repeat=5))
        bound = Bound(problem.unary, problem.edges)
        bound.sweep()
        groups = [Groups.by(cost) for cost in bound.reduced_costs()]
        bound = bound.with_triplets(list(itertools.combinations(range(5), 3)), groups, math.inf)
        for _ in range(200):
            bound.sweep()
        assert bound.lower <= optimum + 1e-9
        assert max(float(np.abs(message).max()) for message in bound.to_first + bound.to_second) < 1e4
