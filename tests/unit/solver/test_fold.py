"""Equal layers folded: the same optimum, proved for the whole network, and nothing believed that is not so."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from shardc.solver import solve as solving
from shardc.solver import tuning
from shardc.solver.bounds.bound import Bound
from shardc.solver.layers.fold import fold
from shardc.solver.problem import Problem, evaluate
from shardc.solver.proof.certificate import Certificate, check
from shardc.solver.proof.prove import Prover
from shardc.solver.solve import WarmStart, solve

VALUES = 5


def layered(count: int, seed: int, odd: Callable[[Problem, int], None] = lambda *_: None) -> Problem:
    """A training graph in small: parameters, a forward chain, a backward chain that counts down, a table read by all
    layers. `odd` may add something to a layer."""
    rng, problem = np.random.default_rng(seed), Problem()
    cost = {name: rng.random(VALUES) for name in ("table", "weight", "product", "act", "loss", "grad", "update")}
    link = {pair: rng.random((VALUES, VALUES)) for pair in ("tp", "wp", "pa", "ax", "al", "lg", "gu", "gg", "wu", "ag")}
    table = problem.add_variable("table", cost["table"])
    weights = [problem.add_variable(f"weight {i}", cost["weight"]) for i in range(count)]
    acts: list[int] = []
    for i, weight in enumerate(weights):
        product = problem.add_variable(f"product {i}", cost["product"])
        problem.add_edge(table, product, link["tp"])
        problem.add_edge(weight, product, link["wp"])
        if acts:
            problem.add_edge(acts[-1], product, link["ax"])
        acts.append(problem.add_variable(f"act {i}", cost["act"]))
        problem.add_edge(product, acts[-1], link["pa"])
        odd(problem, i)
    before = problem.add_variable("loss", cost["loss"])
    problem.add_edge(acts[-1], before, link["al"])
    for i in reversed(range(count)):
        grad = problem.add_variable(f"grad {i}", cost["grad"])
        problem.add_edge(before, grad, link["lg"] if i == count - 1 else link["gg"])
        problem.add_edge(acts[i], grad, link["ag"])
        update = problem.add_variable(f"update {i}", cost["update"])
        problem.add_edge(grad, update, link["gu"])
        problem.add_edge(weights[i], update, link["wu"])
        before = grad
    return problem


def whole(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> float:
    """The optimum, found without folding."""
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "MIN_LAYERS", 10**6)
        assert fold(problem, 2) is None
        solution = solve(problem)
    assert solution.exact
    return solution.cost


@pytest.mark.parametrize("seed", range(6))
def test_folded_equals_whole(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = layered(40, seed)
    folded = fold(problem, 2)
    assert folded is not None and len(folded.template.unary) < len(problem.unary) / 4
    solution = solve(problem)
    assert solution.cost == evaluate(problem, solution.choice)
    assert solution.cost == pytest.approx(whole(problem, monkeypatch), rel=1e-9)
    assert solution.lower_bound <= solution.cost
    assert solution.exact


def test_template_of_equal_layers_proves_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the template proves is carried over to every layer, and checked there by code that knows of no layers."""
    problem = layered(300, 1)
    monkeypatch.setattr(tuning, "LARGE_NETWORK", 0)  # what folding leaves open would stay open
    solution = solve(problem)
    proved = check(problem, solution.certificate)
    assert solution.exact and proved == pytest.approx(solution.cost, rel=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_an_odd_layer_among_equal_ones(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer in the middle has a variable of its own: its cost is not lost, and the optimum is found."""

    def odd(problem: Problem, layer: int) -> None:
        if layer == 20:
            other = problem.add_variable("odd", np.linspace(0.0, 3.0, 3))
            problem.add_edge(len(problem.unary) - 2, other, 9.0 * np.random.default_rng(seed).random((VALUES, 3)))

    problem = layered(40, seed, odd)
    solution = solve(problem)
    assert solution.cost == evaluate(problem, solution.choice)
    assert solution.cost == pytest.approx(whole(problem, monkeypatch), rel=1e-9)


@pytest.mark.parametrize("count", [10, 20, 60])
def test_triplets_are_unfolded(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer has an odd cycle, and one that reaches into the next: messages prove too little. The triplets of the
    template, in every layer, prove it all."""
    monkeypatch.setattr(tuning, "LARGE_NETWORK", 0)
    rng = np.random.default_rng(count)
    costs, differ = [0.3 * rng.random(2) for _ in range(3)], 2.0 * np.eye(2)
    link = 0.2 * rng.random((VALUES, 2))
    before: list[int] = []

    def frustrated(problem: Problem, layer: int) -> None:
        act = len(problem.unary) - 1
        cycle = [problem.add_variable(f"cycle {layer} {i}", cost) for i, cost in enumerate(costs)]
        for u, v in itertools.combinations(cycle, 2):
            problem.add_edge(u, v, differ)
        problem.add_edge(act, cycle[0], link)
        if before:
            problem.add_edge(before[1], cycle[0], differ)
            problem.add_edge(before[2], cycle[0], differ)
        before[:] = cycle

    problem = layered(count, 3, frustrated)
    solution = solve(problem)
    assert solution.certificate.triplets
    alone = {edge: pair for edge, pair in solution.certificate.messages.items() if edge in problem.edges}
    assert check(problem, Certificate(alone)) < 0.999 * solution.cost
    proved = check(problem, solution.certificate)
    assert solution.exact and proved == pytest.approx(solution.cost, rel=1e-8)
    assert solution.cost == pytest.approx(whole(problem, monkeypatch), rel=1e-9)
    for lender in solution.certificate.triplets[:3]:  # spoilt, it proves less, never more
        lender.loans[0][0, 0] += 1.0
        assert check(problem, solution.certificate) <= solution.cost


def test_few_layers_are_not_folded() -> None:
    assert fold(layered(5, 0), 2) is None


def test_never_worse_than_what_folding_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what was found for the template cannot be proved, the search goes on, from there; if it finds nothing
    better in time, nothing is lost."""
    problem = layered(20, 2)
    best = solve(problem)
    folded = solving.WarmStart.of(problem).fold
    assert folded is not None
    template = folded.template
    unproved = Prover(template, Bound(template.unary, template.edges), None, math.inf)
    unproved.take(solve(template).choice)
    monkeypatch.setattr(solving, "_proved", lambda *_: unproved)
    monkeypatch.setattr(solving, "prove", lambda *_: Certificate({}))
    monkeypatch.setattr(solving, "_searched_whole", lambda *_: None)
    monkeypatch.setattr(solving.Search, "close", lambda search: search.choice)
    known: list[list[int]] = []

    def nothing_better(problem: Problem, _: object, choice: list[int], draft: bool) -> tuple[list[int], float]:
        assert not draft
        known.append(choice)
        return [0] * len(problem.unary), 0.5 * best.cost

    monkeypatch.setattr(solving, "_searched", nothing_better)
    solution = solve(problem, certify=False)
    assert solution.choice == known[0] and solution.cost < evaluate(problem, [0] * len(problem.unary))
    assert solution.lower_bound >= 0.5 * best.cost and not solution.exact


@pytest.mark.parametrize("seed", (0, 1, 3, 4, 5))
def test_the_middle_is_proved_as_a_ring(seed: int) -> None:
    """What the template proves is lost in part in every layer of the middle; what a ring of layers proves is not."""
    problem = layered(40, seed)
    solution = solve(problem, certify=False)
    assert solution.warm_start is not None and solution.warm_start.fold is not None
    template = solution.warm_start.fold.unfolded_certificate(solution.warm_start.certificate)
    assert check(problem, template) < solution.cost * (1 - 1e-3)
    assert solution.certificate.remainder is None
    assert check(problem, solution.certificate) == pytest.approx(solution.cost, rel=1e-9)


def test_a_layer_that_is_linked_otherwise_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edge of the template need not be one of the network."""
    rng, count, problem = np.random.default_rng(0), 25, Problem()
    costs, (down, on, across) = (rng.random(4), rng.random(3)), (rng.random(s) for s in ((4, 3), (3, 4), (4, 4)))
    layers: list[tuple[int, int]] = []
    for i in range(count):
        a, b = problem.add_variable(f"a{i}", costs[0]), problem.add_variable(f"b{i}", costs[1])
        problem.add_edge(a, b, down)
        if i:
            problem.add_edge(layers[i - 1][1], a, on)
            problem.add_edge(layers[2 if i == count - 2 else i - 1][0], a, across)
        layers.append((a, b))
    found = solve(problem, certify=False, warm_start=solving.WarmStart.of(problem, 2))
    assert found.cost == pytest.approx(whole(problem, monkeypatch), rel=1e-9)
    assert check(problem, found.certificate) <= found.cost * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_trail_leads_to_the_same_optimum(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found at some costs is a start at others, with fewer edges too; a draft finds as good a choice."""
    problem, rng = layered(40, seed), np.random.default_rng(seed)
    scale: dict[int, np.ndarray] = {}

    def other(table: np.ndarray) -> np.ndarray:
        return scale.setdefault(id(table), table * rng.uniform(0.7, 1.3, table.shape))

    edges = {edge: other(table) for edge, table in problem.edges.items() if edge[0]}  # without those of the table
    changed = Problem([other(cost) for cost in problem.unary], edges, problem.names)
    warm_start = solve(problem, certify=False).warm_start
    assert warm_start is not None and warm_start.fold is not None
    best = whole(changed, monkeypatch)
    for draft in (False, True):
        found = solve(changed, certify=False, warm_start=warm_start, draft=draft)
        assert found.cost == evaluate(changed, found.choice) == pytest.approx(best, rel=1e-9)
        assert found.lower_bound <= best * (1 + 1e-9)
    with pytest.raises(ValueError, match="no edge of what was folded"):
        solve(problem, warm_start=solving.WarmStart(warm_start.fold.over(changed)))


def rings(scale: float, seed: int) -> Problem:
    """Equal layers, each a ring of five variables: cycles keep messages from the optimum, and triplets have chords."""
    rng, problem = np.random.default_rng(seed), Problem()
    tables, link, alone = rng.random((5, 3, 3)), rng.random((3, 3)) * 0.3, scale * rng.random((5, 3)) * 0.2
    parts = [*tables], [*alone]
    for layer in range(12):
        first = len(problem.unary)
        for place in range(5):
            problem.add_variable(f"{layer}.{place}", parts[1][place])
        for place in range(5):
            problem.add_edge(first + place, first + (place + 1) % 5, parts[0][place])
        if layer:
            problem.add_edge(first - 5, first, link)
    return problem


def test_a_draft_after_a_proof_that_needed_triplets() -> None:
    needed = 0
    for seed in range(20):
        warm_start = solve(rings(1.0, seed), certify=False).warm_start
        assert warm_start is not None and warm_start.fold is not None
        needed += bool(warm_start.certificate.triplets)
        problem = rings(1.05, seed)
        draft = solve(problem, certify=False, relative_gap=1e-2, warm_start=warm_start, draft=True)
        assert draft.cost == evaluate(problem, draft.choice)
    assert needed


def test_a_choice_that_does_not_unfold() -> None:
    """Where equal layers may not follow each other as the template's ends do, the choice is looked for anew."""
    problem = Problem()
    link = np.array([[np.inf, 0.0], [1.0, np.inf]])  # turns
    for v in range(31):
        problem.add_variable(f"v{v}", np.array([1.0, 1.0]))
        if v:
            problem.add_edge(v - 1, v, link)
    for draft in (False, True):
        found = solve(problem, certify=False, draft=draft)
        assert found.cost == 31.0 + 15.0 and found.lower_bound <= found.cost
        assert found.exact is not draft


@pytest.mark.parametrize("seed", range(3))
def test_without_a_certificate_the_rest_is_eliminated(seed: int) -> None:
    """What folding leaves open is closed by pruning and elimination over the whole network."""
    problem = layered(40, seed)
    with_certificate, without = solve(problem), solve(problem, certify=False)
    assert without.exact and without.cost == pytest.approx(with_certificate.cost, rel=1e-9)
    assert check(problem, without.certificate) <= with_certificate.cost


def test_a_rough_solve_of_layers_with_cycles_is_as_close_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer a cycle on which pairs alone prove a fourth too little (`bounds/triplets.py`). The network counts
    as too large to be searched whole."""
    monkeypatch.setattr(tuning, "LARGE_NETWORK", 0)
    monkeypatch.setattr(tuning, "SHORT_SWEEP_ENTRIES", 0)
    problem, cost, link = Problem(), np.array([0.0, 0.6]), np.array([[0.0, 0.01], [0.01, 0.0]])
    pair = np.array([[1.0, 0.0], [0.0, 0.0]])
    for layer in range(20):
        a, b, c = (problem.add_variable(f"{name} {layer}", cost) for name in "abc")
        for one, other in ((a, b), (b, c), (a, c)):
            problem.add_edge(one, other, pair)
        if layer:
            problem.add_edge(a - 1, a, link)
    assert fold(problem, 2) is not None
    found = solve(problem, certify=False, relative_gap=1e-3, warm_start=WarmStart.of(problem, tuning.FOLD_KEPT))
    assert found.cost == pytest.approx(24.0)
    assert found.gap <= 2e-3 * found.cost
    assert check(problem, found.certificate) == pytest.approx(found.lower_bound)


def test_layers_that_take_turns_are_folded_by_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth layer has a variable more; weights and backward are alike in all."""
    table = np.random.default_rng(0).random((VALUES, 3))

    def odd(problem: Problem, layer: int) -> None:
        if layer % 4 == 3:
            other = problem.add_variable(f"odd {layer}", np.linspace(0.0, 0.3, 3))
            problem.add_edge(len(problem.unary) - 2, other, table)

    problem = layered(80, 3, odd)
    folded = fold(problem, 1)
    assert folded is not None and folded.count in (18, 19, 20)
    assert len(folded.template.unary) < len(problem.unary) / 3
    solution = solve(problem)
    assert solution.exact and solution.cost == pytest.approx(whole(problem, monkeypatch), rel=1e-9)


def test_layers_that_read_other_variables_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers read one variable or another in turns, by the same table; the two are best at different values."""
    rng = np.random.default_rng(1)
    read, inside, along = rng.random((3, 2)), rng.random((2, 4)), rng.random((4, 2))
    problem, count = Problem(), 60
    shared = [problem.add_variable(f"positions {i}", cost) for i, cost in enumerate(rng.random((2, 3)) * count)]
    before = -1
    for i in range(count):
        first = problem.add_variable(f"first {i}", np.zeros(2))
        problem.add_edge(shared[i % 3 == 2], first, read)
        if i:
            problem.add_edge(before, first, along)
        before = problem.add_variable(f"second {i}", np.zeros(4))
        problem.add_edge(first, before, inside)
    folded = fold(problem, 1)
    assert folded is not None and folded.count in (19, 20)
    solution = solve(problem)
    assert solution.exact and solution.cost == pytest.approx(whole(problem, monkeypatch), rel=1e-9)


def test_towers_that_share_no_layer_are_folded_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an encoder and a decoder: a value of the last layer of the one is read by every layer of the other."""
    rng = np.random.default_rng(2)
    tables = {name: rng.random((VALUES, VALUES)) for name in ("near", "up", "down", "cross")}
    costs = rng.random((4, VALUES))
    problem, end = Problem(), -1
    for tower in range(2):
        before = -1
        for i in range(20):
            made = [problem.add_variable(f"{tower} {i} {k}", costs[2 * tower + k]) for k in range(2)]
            problem.add_edge(made[0], made[1], tables["near"])
            if i:
                problem.add_edge(before, made[0], tables["up" if tower else "down"])
            if tower:
                problem.add_edge(end, made[1], tables["cross"])
            before = made[1]
        end = before
    folded = fold(problem, 1)
    assert folded is not None and len(folded.template.unary) < len(problem.unary) / 3
    solution = solve(problem)
    assert solution.exact and solution.cost == pytest.approx(whole(problem, monkeypatch), rel=1e-9)


def test_what_a_template_leaves_open_in_every_layer_is_closed_by_a_sweep_over_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three variables a layer that are linked in random ways. Messages at the cut do not meet those of the layer
    before: unfolded, they leave 6 % of the cost open."""
    monkeypatch.setattr(solving, "_ring_certificate", lambda *_: None)
    monkeypatch.setattr(tuning, "LARGE_NETWORK", 0)  # a search over all layers would take too long
    problem, rng = Problem(), np.random.default_rng(10)
    costs = [rng.random(3) for _ in range(3)]
    inner = {pair: rng.random((3, 3)) for pair in ((0, 1), (0, 2), (1, 2))}
    links = {(a, b): rng.random((3, 3)) for a in range(3) for b in range(3) if rng.random() < 0.5}
    for layer in range(30):
        for a, cost in enumerate(costs):
            problem.add_variable(f"layer {layer}, {a}", cost)
        for (a, b), table in inner.items():
            problem.add_edge(3 * layer + a, 3 * layer + b, table)
        for (a, b), table in links.items():
            if layer:
                problem.add_edge(3 * layer - 3 + a, 3 * layer + b, table)
    found = solve(problem, certify=False, relative_gap=1e-3)
    assert found.warm_start is not None and found.warm_start.fold is not None
    assert found.gap <= 1e-3 * found.cost
    monkeypatch.setattr(solving, "prove", lambda *given: given[3])
    assert solve(problem, certify=False, relative_gap=1e-3).gap > 0.05 * found.cost
