"""What papers derived by hand equals what the planner finds; `benchmarks/planner.py` asks for a whole grid."""

from __future__ import annotations

import pytest

from checks.closed_forms import Axonn, Poseidon, Recipe, axonn_cases, recipes, sent


@pytest.mark.parametrize(
    "case",
    [
        Axonn(4096, 1024, 2048, 1, 1, 2, 4),
        Axonn(4096, 1024, 2048, 2, 2, 2, 1),
        Axonn(1024, 4096, 512, 1, 4, 2, 1),
        Axonn(2048, 4096, 1024, 2, 2, 2, 2),
    ],
    ids=str,
)
def test_axonn(case: Axonn) -> None:
    """The paper's layouts cost what the paper says, and no plan for weights stored so is dearer."""
    assert case.planned(only=True) == pytest.approx(case.seconds(), rel=1e-9)
    assert case.planned(only=False) <= case.seconds() * (1 + 1e-9)


def test_axonn_best_configuration() -> None:
    cases = list(axonn_cases(4, ((8192, 1024, 2048),)))
    assert min(cases, key=lambda case: case.planned(only=True)) == min(cases, key=Axonn.seconds)


@pytest.mark.parametrize("samples", [8, 127, 128, 129, 512])
def test_poseidon(samples: int) -> None:
    """Of a square layer the factors are gathered exactly where the inequality says so: 8 workers, 1024 x 1024."""
    case = Poseidon(1024, 1024, samples, 8)
    plan = case.planned().plan
    ways = case.seconds()
    assert plan.cost == pytest.approx(min(ways.values()), rel=1e-9)
    gathers = {c.kind for c in plan.conversions if c.sent} == {"all_gather"}
    if samples == 128:  # where both take the same
        assert ways["gather the factors"] == ways["reduce the gradient"]
    else:
        assert gathers == case.inequality == (samples < 128)


@pytest.mark.parametrize(("outputs", "inputs"), [(8192, 256), (256, 8192)])
def test_poseidon_of_a_long_layer_has_a_third_way(outputs: int, inputs: int) -> None:
    """The gradient cut by its longer dim: one factor is gathered, the other moved, and the gradient gathered."""
    case = Poseidon(outputs, inputs, 64, 8)
    plan, ways = case.planned().plan, case.seconds()
    assert plan.cost == pytest.approx(ways["cut its outputs" if outputs > inputs else "cut its inputs"], rel=1e-9)
    assert plan.cost < min(ways["reduce the gradient"], ways["gather the factors"])
    assert {c.kind for c in plan.conversions if c.sent} == {"all_gather", "all_to_all"}


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_recipes(recipe: Recipe) -> None:
    """Where weights are stored as a recipe has them, the plan sends what it sends; a free one is never dearer."""
    found, free = recipe.planned(free=False), recipe.planned(free=True)
    assert sent(found) == pytest.approx(dict(recipe.sends))
    assert found.plan.cost - found.plan.lower_bound <= 1e-6 * found.plan.cost
    assert free.plan.cost <= found.plan.cost
