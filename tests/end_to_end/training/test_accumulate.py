"""Gradients of several backwards that are reduced once: values, what is sent, and what users do meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc import ShardcError

MESH = "dp=2,tp=2"
LAYOUTS = {
    "whole": {"up": ("dp", None), "down": ("dp", None)},
    "split": {"up": ("dp", None), "down": ("dp", None), "up.weight": ("dp", None), "down.weight": (None, ("dp", "tp"))},
    "both": {"up": ("dp", "tp"), "down": ("dp", None), "up.bias": (None,)},
}
"""Parameters whole on every rank, all-reduced; split and reduce-scattered; and under tensor parallelism."""


class Tied(nn.Module):
    """Two layers, of which one is used twice; a parameter that is frozen, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.back = nn.Linear(16, 32, bias=False)
        self.back.weight = self.up.weight
        self.scale = nn.Parameter(torch.ones(16), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x)) + torch.tanh(self.back(x))
        return (self.down(hidden) * self.scale).square().mean()


class Case:
    """The same model on one device and sharded, with three batches."""

    def __init__(self, layout: str) -> None:
        torch.manual_seed(0)
        self.one = Tied().double()
        self.many = copy.deepcopy(self.one)
        shardc.shard(self.many, mesh=MESH, mode="propagate", constraints=LAYOUTS[layout])
        self.batches = [torch.randn(8, 16, dtype=torch.float64) for _ in range(3)]
        for model in (self.one, self.many):
            self.loop(model)

    def loop(self, model: nn.Module) -> None:
        for x in self.batches:
            (model(x) / len(self.batches)).backward()

    def equal(self) -> None:
        for (name, ours), theirs in zip(self.many.named_parameters(), self.one.parameters(), strict=True):
            assert type(ours) is nn.Parameter, name
            assert (ours.grad is None) == (theirs.grad is None), name
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10, msg=name)

    def clear(self) -> None:
        for model in (self.one, self.many):
            model.zero_grad()

    @property
    def sent(self) -> float:
        """Bytes that a rank has sent since this was asked last."""
        mesh = self.many.compiled.executable.mesh
        total = sum(mesh.traffic.values())
        mesh.reset()
        return total


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {layout: Case(layout) for layout in LAYOUTS}


@pytest.fixture
def case(cases: dict[str, Case]) -> Case:
    cases["split"].clear()
    return cases["split"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_loop_and_are_reduced_once(cases: dict[str, Case], layout: str) -> None:
    case = cases[layout]
    case.equal()
    for _ in range(2):  # on top of the gradients that there are
        case.loop(case.one)
        with shardc.accumulate(case.many):
            case.loop(case.many)
        case.equal()
    case.clear()
    sent: list[float] = []
    with shardc.accumulate(case.many):
        for _ in range(2):
            loss, _ = case.many(case.batches[0]), case.sent
            loss.backward()
            sent.append(case.sent)
        program = case.many.compiled
    once = case.sent
    assert sent[0] == sent[1]
    assert once > 0
    assert "DEFERRED" in program.code
    assert "sums of gradients" in program.plan.memory.parts
    loss, _ = case.many(case.batches[0]), case.sent
    loss.backward()
    assert case.sent == pytest.approx(sent[0] + once)


def _ones() -> Tensor:
    return torch.ones(8, 16, dtype=torch.float64)


def _twice(loss: Tensor) -> None:
    for _ in range(2):
        loss.backward(retain_graph=True)


def _norm(model: nn.Module) -> Tensor:
    return nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def _set(model: nn.Module) -> None:
    model.get_parameter("up.weight").grad = torch.ones(32, 16, dtype=torch.float64)


def _step(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    optimizer.step()
    optimizer.zero_grad()


MEANWHILE: dict[str, Callable[[nn.Module], object]] = {
    "read": lambda model: model.get_parameter("down.bias").grad,
    "clip": _norm,
    "zero": lambda model: model.zero_grad(),
    "set": _set,
    "step": _step,
    "copy": copy.deepcopy,
    "backward into one": lambda model: model(_ones()).backward(inputs=[model.get_parameter("up.bias")]),
    "none left": lambda model: [setattr(one, "grad", None) for one in model.parameters()],
    "twice": lambda model: _twice(model(_ones())),
    "evaluate": lambda model: torch.no_grad()(model)(_ones()),
}  # fmt: skip


@pytest.mark.parametrize("what", MEANWHILE)
def test_what_users_do_between_two_backwards(case: Case, what: str) -> None:
    case.loop(case.one)
    MEANWHILE[what](case.one)
    case.loop(case.one)
    with shardc.accumulate(case.many):
        case.loop(case.many)
        MEANWHILE[what](case.many)
        case.loop(case.many)
    case.equal()


def test_gradients_that_are_asked_for_come_at_once(case: Case) -> None:
    def asked(model: nn.Module) -> list[Tensor]:
        x = case.batches[0].clone().requires_grad_()
        loss = model(x)
        model(x).backward()
        assert x.grad is not None
        return [
            *torch.autograd.grad(loss, [model.get_parameter("up.weight"), model.get_parameter("down.bias")]),
            x.grad,
        ]

    expected = asked(case.one)
    with shardc.accumulate(case.many):
        found = asked(case.many)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    case.equal()


def test_hooks_see_what_they_see_on_one_device(case: Case) -> None:
    def seen(model: nn.Module) -> list[Tensor]:
        found: list[Tensor] = []
        parameter = model.get_parameter("up.weight")
        hooks = [
            parameter.register_hook(lambda gradient: found.append(gradient.clone())),
            parameter.register_post_accumulate_grad_hook(lambda one: found.append(one.grad.clone())),  # type: ignore[union-attr]
        ]
        case.loop(model)
        for hook in hooks:
            hook.remove()
        return found

    expected = seen(case.one)
    with shardc.accumulate(case.many):
        found = seen(case.many)
    assert len(found) == len(expected)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    case.equal()


def test_a_block_in_a_block_and_an_exception(case: Case) -> None:
    case.loop(case.one)
    case.loop(case.one)
    with shardc.accumulate(case.many):
        with shardc.accumulate(nn.ModuleList([case.many])):
            case.loop(case.many)
        assert case.many.get_parameter("up.bias").__class__ is not nn.Parameter  # its gradient still waits
        case.loop(case.many)
    case.equal()
    with pytest.raises(KeyError), shardc.accumulate(case.many):
        case.loop(case.many)
        raise KeyError
    case.equal()
    case.loop(case.one)
    case.loop(case.many)
    case.equal()


def test_a_parameter_that_is_computed(case: Case) -> None:
    """What was called with it gets its gradient at once."""
    found: list[Tensor] = []
    for model in (case.one, case.many):
        factor = torch.ones(32, 1, dtype=torch.float64, requires_grad=True)
        with shardc.accumulate(case.many):
            weight = model.get_parameter("up.weight").detach() * factor
            torch.func.functional_call(model, {"up.weight": weight}, (case.batches[0],)).backward()
        assert factor.grad is not None
        found.append(factor.grad)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_what_cannot_be_accumulated() -> None:
    with pytest.raises(ShardcError, match="nothing of Linear is sharded"), shardc.accumulate(nn.Linear(2, 2)):
        pass
    whole = {"0": ("dp", None), "0.weight": "-,-"}
    tight, x = nn.Sequential(nn.Linear(256, 256, bias=False)), torch.randn(512, 256)
    free = shardc.compile(tight, "dp=2", (x,), mode="propagate", constraints=whole)
    room = 0.5 * (free.plan.memory.peak + free.accumulating.plan.memory.peak)
    shardc.shard(tight, mesh="dp=2", mode="propagate", constraints=whole, memory=room)
    with pytest.raises(ShardcError, match=r"gradients that are accumulated .* take"), shardc.accumulate(tight):
        tight(x)
