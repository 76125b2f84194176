"""A hand-written generated module on a virtual mesh, against eager."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardc.runtime import Executable, RankError, load

MLP = Path(__file__).parents[2] / "distributed" / "mlp.py"


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {
        "up.weight": torch.randn(16, 8, dtype=torch.float64, requires_grad=True),
        "down.weight": torch.randn(8, 16, dtype=torch.float64, requires_grad=True),
        "steps": torch.zeros((), dtype=torch.float64),
    }


def eager(state, x):
    y = (x @ state["up.weight"].t()).relu() @ state["down.weight"].t()
    return (y * y).sum(), y


def gradients(value, state):
    return torch.autograd.grad(value, [state["up.weight"], state["down.weight"]])


def from_y() -> str:
    """The same module with a backward that starts from the second output."""
    source = MLP.read_text()
    source = source.replace('Slot("tangent", "", 0, (), "float64", ())', 'Slot("tangent", "", 1, (4, 8), "float64", X)')
    return source.replace("grad_y = 2 * y * tangent", "grad_y = tangent")


def test_values_gradients_and_buffers(state):
    x = torch.randn(4, 8, dtype=torch.float64)
    call = Executable(load(MLP)).bind(state)
    loss, y = call(x)
    expected, expected_y = eager(state, x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(y, expected_y)
    assert state["steps"] == 1
    for ours, theirs in zip(gradients(loss, state), gradients(expected, state), strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_without_gradients(state):
    executable = Executable(load(MLP))
    with torch.no_grad():
        loss, _ = executable.run(state, [torch.ones(4, 8, dtype=torch.float64)])
    assert not loss.requires_grad and state["steps"] == 1


def test_tangent_that_backward_does_not_take(state):
    x = torch.randn(4, 8, dtype=torch.float64)
    executable = Executable(load(MLP))
    _, y = executable.run(state, [x])
    with pytest.raises(RankError, match="output 1 got a gradient"):
        y.sum().backward()
    asked = []

    def fallback(indices):
        asked.append(indices)
        return Executable(load(from_y()), executable.mesh)

    _, y = executable.run(state, [x], fallback)
    for ours, theirs in zip(gradients(y.sum(), state), gradients(eager(state, x)[1].sum(), state), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert asked == [frozenset({1})] and state["steps"] == 2


def test_refusals(state):
    executable = Executable(load(MLP))
    with pytest.raises(RankError, match="input:0 must be float64"):
        executable.run(state, [torch.ones(4, 8)])
    with pytest.raises(RankError, match="input:0 is missing"):
        executable.run(state, [])
    with pytest.raises(RankError, match="steps is not in the state"):
        executable.run({k: v for k, v in state.items() if k != "steps"}, [torch.ones(4, 8, dtype=torch.float64)])


def test_a_program_that_draws_from_seeds_is_not_run_again_by_another(state):
    """Another program would draw other numbers than the forward whose output is differentiated."""
    module = load(MLP)
    module.RANDOM = "independent"
    _, y = Executable(module).run(state, [torch.randn(4, 8, dtype=torch.float64)], lambda _: Executable(load(from_y())))
    with pytest.raises(RankError, match="randomness='exact'"):
        y.sum().backward()
