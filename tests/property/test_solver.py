"""The solver against brute force on small networks and against an independent linear program on medium ones."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from shardc.errors import InfeasibleError
from shardc.solver import tuning
from shardc.solver.exact import milp as milp_module
from shardc.solver.exact import presolve
from shardc.solver.problem import Array, Edge, Problem, evaluate
from shardc.solver.proof.certificate import Certificate, Lender, check
from shardc.solver.proof.remainder import Remainder
from shardc.solver.solve import solve

SHAPES = ("tree", "grid", "dense", "cycle", "empty")


def pairs(shape: str, n: int, rng: np.random.Generator) -> list[Edge]:
    if shape == "tree":
        return [(int(rng.integers(v)), v) for v in range(1, n)]
    if shape == "grid":
        width = max(2, round(math.sqrt(n)))
        right = [(v, v + 1) for v in range(n - 1) if (v + 1) % width]
        return right + [(v, v + width) for v in range(n - width)]
    if shape == "cycle":
        return [(v, (v + 1) % n) for v in range(n) if n > 2]
    return list(itertools.combinations(range(n), 2)) if shape == "dense" else []


def draw(rng: np.random.Generator, size: tuple[int, ...], *, forbid: float, tied: bool, unit: float) -> Array:
    cost = rng.integers(0, 4, size).astype(float) if tied else rng.random(size)
    cost *= unit
    cost[rng.random(size) < forbid] = np.inf
    return cost


def network(rng: np.random.Generator, shape: str, n: int, d: int, forbid: float, tied: bool) -> Problem:
    """A random network; half of the tables are taken from a few shared ones, as in repeated layers."""
    unit = 10.0 ** float(rng.integers(-7, 3))
    problem = Problem()
    sizes = [int(rng.integers(1, d + 1)) for _ in range(n)]
    for v, size in enumerate(sizes):
        problem.add_variable(f"v{v}", draw(rng, (size,), forbid=forbid / 2, tied=tied, unit=unit))
    shared: dict[Edge, Array] = {}
    for u, v in pairs(shape, n, rng):
        for _ in range(1 + int(rng.random() < 0.1)):
            fresh = draw(rng, (sizes[u], sizes[v]), forbid=forbid, tied=tied, unit=unit)
            table = shared.setdefault((sizes[u], sizes[v]), fresh) if rng.random() < 0.5 else fresh
            problem.add_edge(u, v, table)
    return problem


def brute_force(problem: Problem) -> float:
    choices = itertools.product(*(range(len(cost)) for cost in problem.unary))
    return min((evaluate(problem, choice) for choice in choices), default=math.inf)


def examine(problem: Problem, optimum: float) -> None:
    """Everything that a solution promises."""
    if math.isinf(optimum):
        with pytest.raises(InfeasibleError):
            solve(problem)
        return
    solution = solve(problem)
    scale = 1e-8 * (1.0 if optimum == 0 else abs(optimum)) + 1e-300
    assert solution.exact
    assert abs(solution.cost - optimum) <= scale
    assert solution.cost == evaluate(problem, solution.choice) == solution.lower_bound
    assert check(problem, solution.certificate) <= optimum * (1 + 1e-12)
    assert solve(problem).choice == solution.choice


CASES = [
    pytest.param(shape, forbid, tied, id=f"{shape}-{forbid}-{'ties' if tied else 'free'}")
    for shape in SHAPES
    for forbid in (0.0, 0.15, 0.45)
    for tied in (False, True)
]


@pytest.mark.parametrize(("shape", "forbid", "tied"), CASES)
def test_brute_force(shape: str, forbid: float, tied: bool) -> None:
    rng = np.random.default_rng([len(shape), int(100 * forbid), tied])
    for _ in range(12):
        problem = network(rng, shape, int(rng.integers(1, 7)), 4, forbid, tied)
        examine(problem, brute_force(problem))


@pytest.mark.parametrize(("shape", "forbid", "tied"), CASES)
def test_without_contraction(shape: str, forbid: float, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps, pruning and elimination have to do all of the work."""
    monkeypatch.setattr(presolve.ReducedNetwork, "contract", lambda self, variables: set())
    monkeypatch.setattr(presolve.ReducedNetwork, "drop_dominated", lambda self, variables: set())
    monkeypatch.setattr(tuning, "IMMEDIATE_WORK", 0.0)
    rng = np.random.default_rng([len(shape), int(100 * forbid), tied, 1])
    for _ in range(5):
        problem = network(rng, shape, int(rng.integers(1, 7)), 4, forbid, tied)
        examine(problem, brute_force(problem))


def linear_program(problem: Problem) -> float:
    """The optimum by another road: the textbook integer program, entry by entry."""
    scale = max(float(c[np.isfinite(c)].max(initial=0.0)) for c in [*problem.unary, *problem.edges.values()]) / 100
    costs: list[float] = []
    upper: list[float] = []

    def variables(table: Array) -> np.ndarray:
        start = len(costs)
        costs.extend(np.where(np.isinf(table), 0.0, table / scale).ravel())
        upper.extend(np.where(np.isinf(table), 0.0, 1.0).ravel())
        return np.arange(start, len(costs)).reshape(table.shape)

    nodes = [variables(cost) for cost in problem.unary]
    count = len(costs)
    links = {edge: variables(table) for edge, table in problem.edges.items()}
    rows = [(list(node), [], 1.0) for node in nodes]
    for (u, v), link in links.items():
        rows += [(list(link[a]), [nodes[u][a]], 0.0) for a in range(len(nodes[u]))]
        rows += [(list(link[:, b]), [nodes[v][b]], 0.0) for b in range(len(nodes[v]))]
    matrix = lil_array((len(rows), len(costs)))
    for i, (plus, minus, _) in enumerate(rows):
        matrix[i, plus] = 1.0
        for j in minus:
            matrix[i, j] = -1.0
    right = [row[2] for row in rows]
    result = milp(
        costs,
        constraints=LinearConstraint(matrix.tocsr(), right, right),
        integrality=np.arange(len(costs)) < count,
        bounds=Bounds(0.0, np.array(upper)),
        options={"mip_rel_gap": 0.0},
    )
    return math.inf if result.status == 2 else float(result.fun) * scale


@pytest.mark.parametrize("forbid", [0.0, 0.05])
@pytest.mark.parametrize("tied", [False, True])
def test_branching(forbid: float, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be eliminated and no triplet added, so that what the bound leaves open goes to HiGHS."""
    monkeypatch.setattr(tuning, "WORK_ENTRIES", -1.0)
    monkeypatch.setattr(tuning, "MAX_TRIPLETS", 0)
    branched: list[int] = []
    inner = milp_module.solve_milp
    monkeypatch.setattr(milp_module, "solve_milp", lambda *args: branched.append(1) or inner(*args))
    rng = np.random.default_rng([int(100 * forbid), tied, 2])
    for _ in range(5):
        problem = network(rng, "dense", 9, 5, forbid, tied)
        examine(problem, linear_program(problem))
    assert branched


@pytest.mark.parametrize("seed", range(3))
def test_triplets_close_frustrated_cycles(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tensors are each gathered (at a cost) or not; every two share a product that wants one of its operands
    gathered. The relaxation gathers half of each; with triplets the bound meets the optimum, without any other help."""
    monkeypatch.setattr(tuning, "WORK_ENTRIES", -1.0)
    monkeypatch.setattr(milp_module, "solve_milp", lambda *_: pytest.fail("nothing should be left to branch over"))
    rng, problem = np.random.default_rng([seed, 5]), Problem()
    for v in range(3):
        problem.add_variable(f"tensor {v}", np.array([1.0 + 0.1 * rng.random(), 0.0]))
    for u, v in itertools.combinations(range(3), 2):
        product = problem.add_variable(f"product of {u} and {v}", 0.01 * rng.random(3))
        problem.add_edge(u, product, np.array([[0.0, 9.0, 0.0], [9.0, 0.0, 9.0]]))
        problem.add_edge(v, product, np.array([[0.0, 0.0, 9.0], [9.0, 9.0, 0.0]]))
        # 0: both gathered, 1: the second alone, 2: the first alone; a third neighbour, so that nothing is contracted
        other = problem.add_variable(f"result of {u} and {v}", np.zeros(2))
        problem.add_edge(product, other, 0.01 * rng.random((3, 2)))
        problem.add_edge(u, other, 0.01 * rng.random((2, 2)))
        problem.add_edge(v, other, 0.01 * rng.random((2, 2)))
    examine(problem, linear_program(problem))


@pytest.mark.parametrize("seed", range(12))
def test_medium_networks(seed: int) -> None:
    rng = np.random.default_rng([seed, 3])
    shape, n, d = (("tree", 40, 8), ("grid", 25, 5), ("dense", 8, 5), ("cycle", 60, 6))[seed % 4]
    problem = network(rng, shape, n, d, 0.1 * (seed % 3), tied=bool(seed % 2))
    examine(problem, linear_program(problem))


def test_certificate_of_a_tree_is_tight() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        problem = network(rng, "tree", 12, 5, 0.1, tied=False)
        try:
            solution = solve(problem)
        except InfeasibleError:
            continue
        assert solution.cost - check(problem, solution.certificate) <= 1e-8 * solution.cost


def test_frustrated_cycle_has_a_tight_certificate() -> None:
    """An odd cycle of 'differ' edges: relaxation 0, optimum 1. Messages prove nothing, a triplet proves it all."""
    problem = Problem()
    for v in range(3):
        problem.add_variable(f"v{v}", np.zeros(2))
    for u, v in itertools.combinations(range(3), 2):
        problem.add_edge(u, v, np.eye(2))
    solution = solve(problem)
    assert (solution.cost, solution.lower_bound) == (1.0, 1.0)
    assert check(problem, Certificate(solution.certificate.messages)) < 0.5
    assert 1.0 - 1e-12 < check(problem, solution.certificate) < 1.0


def wild(rng: np.random.Generator, problem: Problem, unit: float) -> Certificate:
    """Any messages, any triplets, any loans."""
    n = len(problem.unary)
    lenders: list[Lender] = []
    for a, b, c in [t for t in itertools.combinations(range(n), 3) if rng.random() < 0.4]:
        counts = [int(rng.integers(1, 4)) for _ in range(3)]
        groups = [rng.integers(0, k, len(problem.unary[v])) for k, v in zip(counts, (a, b, c), strict=True)]
        x, y, z = (unit * rng.normal(size=(counts[i], counts[j])) for i, j in ((0, 1), (1, 2), (0, 2)))
        lenders.append(Lender((a, b, c), (groups[0], groups[1], groups[2]), (x, y, z)))
    edges = {*problem.edges, *(e for t in lenders for e in itertools.combinations(t.variables, 2))}
    messages = {
        (u, v): (unit * rng.normal(size=len(problem.unary[u])), unit * rng.normal(size=len(problem.unary[v])))
        for u, v in edges
        if rng.random() < 0.7
    }
    return Certificate(messages, tuple(lenders))


@pytest.mark.parametrize(("shape", "forbid", "tied"), CASES)
def test_any_certificate_bounds(shape: str, forbid: float, tied: bool) -> None:
    """However wrong messages and loans are, no bound lies above the optimum; nor when a good certificate is spoilt."""
    rng = np.random.default_rng([len(shape), int(100 * forbid), tied, 6])
    for _ in range(8):
        problem = network(rng, shape, int(rng.integers(3, 6)), 4, forbid, tied)
        optimum = brute_force(problem)
        unit = 10.0 ** float(rng.integers(-8, 3))
        for _ in range(5):
            assert check(problem, wild(rng, problem, unit)) <= optimum
        if math.isinf(optimum):
            continue
        good = solve(problem).certificate
        for lender in good.triplets:
            lender.loans[int(rng.integers(3))].flat[0] += unit * float(rng.normal())
        for message, _ in good.messages.values():
            message[int(rng.integers(len(message)))] += unit * float(rng.normal())
        assert check(problem, good) <= optimum


def test_odd_cycles_get_certificates() -> None:
    """Dense networks of small domains, full of odd cycles: triplets prove what messages cannot."""
    closed = 0
    for seed in range(10):
        rng = np.random.default_rng([seed, 7])
        problem = network(rng, "dense", 5, 3, 0.1 * (seed % 2), tied=False)
        try:
            solution = solve(problem)
        except InfeasibleError:
            continue
        proved = check(problem, Certificate(solution.certificate.messages))
        whole = check(problem, solution.certificate)
        assert proved <= whole <= solution.cost
        closed += solution.cost - whole <= 1e-7 * solution.cost
    assert closed >= 6


@pytest.mark.parametrize(("shape", "forbid", "tied"), CASES)
def test_any_remainder_bounds(shape: str, forbid: float, tied: bool) -> None:
    """However wrong messages and loans are, what they leave is searched whole: its least is the optimum, or what was to
    be undercut if that is less."""
    rng = np.random.default_rng([len(shape), int(100 * forbid), tied, 8])
    for _ in range(8):
        problem = network(rng, shape, int(rng.integers(3, 6)), 4, forbid, tied)
        optimum = brute_force(problem)
        if math.isinf(optimum):
            continue
        spoilt = wild(rng, problem, 10.0 ** float(rng.integers(-8, 3)))
        bound, order = check(problem, spoilt), tuple(map(int, rng.permutation(len(problem.unary))))
        for below in (optimum - 0.1 * abs(optimum), optimum, optimum + 0.1 * abs(optimum)):
            proved = check(problem, replace(spoilt, remainder=Remainder(below, order)))
            assert proved <= optimum
            assert proved == pytest.approx(max(bound, min(below, optimum)), rel=1e-9, abs=1e-12 * abs(optimum))
            for bad in (order[:1], order * 2):
                assert bound <= check(problem, replace(spoilt, remainder=Remainder(below, bad))) <= optimum


def test_an_order_that_does_not_fit_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = network(np.random.default_rng(3), "dense", 6, 4, 0.0, tied=False)
    optimum, order = brute_force(problem), tuple(range(6))
    whole = Certificate({}, remainder=Remainder(2 * optimum, order))
    assert check(problem, whole) == pytest.approx(optimum)
    for bad in (order[:1], order * 2):
        spoilt = replace(whole, remainder=Remainder(2 * optimum, bad))
        assert check(problem, spoilt) == check(problem, Certificate({})) < 0.9 * optimum
    monkeypatch.setattr(tuning, "CHECKED_FACTOR_ENTRIES", 2)
    assert check(problem, whole) == check(problem, Certificate({}))


def star(leaves: int) -> Problem:
    """A hub between whose values lie as many steps as it has leaves."""
    problem, table = Problem(), np.array([[0.1, 0.1], [0.0, 0.0]])
    problem.add_variable("hub", np.array([0.0, 1e9]))
    for leaf in range(leaves):
        problem.add_variable(f"leaf {leaf}", np.zeros(2))
        problem.add_edge(0, 1 + leaf, table)
    return problem


def test_roundings_of_long_sums_leave_no_value_out() -> None:
    problem = star(10_000)
    optimum, order = 1_000.0, (*range(1, 10_001), 0)
    for above in (0.0, 1e-15, 1e-14, 1e-13, 1e-12):
        assert check(problem, Certificate({}, remainder=Remainder(optimum * (1.0 + above), order))) <= optimum


def test_an_order_with_more_dims_than_arrays_have_proves_nothing() -> None:
    problem = star(70)
    hub_first = Remainder(2e9, tuple(range(71)))
    assert check(problem, Certificate({}, remainder=hub_first)) == check(problem, Certificate({}))


def test_messages_whose_sums_would_overflow_are_refused() -> None:
    problem = star(2)
    for sign in (1.0, -1.0):
        with pytest.raises(ValueError, match="not finite floats"):
            check(problem, Certificate({(0, 1): (np.array([0.0, sign * 1e308]), np.zeros(2))}))
