"""Which gradients there are, and how often backward may run: as autograd has it on one device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc.runtime import Executable, load

MESHES = ("dp=2,tp=2", "a=3")


class Heads(nn.Module):
    """Two heads on a body, one of them also on a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(12, 24), nn.Linear(24, 6), nn.Linear(24, 6)
        self.frozen = nn.Linear(24, 6).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.body(x))
        a, b = self.a(hidden) + self.frozen(hidden), self.b(hidden)
        return {"a": a, "b": b, "y": y * self.scale, "mean": a.mean(), "seen": b.detach()}


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(12, size, dtype=torch.float64, generator=generator) for size in (12, 6))
    return x.requires_grad_(), y.requires_grad_()


def both(mesh: str, run: Callable[[nn.Module, Tensor, Tensor], Any]) -> tuple[Any, Any]:
    """What `run` returns on one device and on the mesh."""
    torch.manual_seed(0)
    single = Heads().double()
    sharded = shardc.shard(copy.deepcopy(single), mesh=mesh, hardware="cpu")
    return run(single, *inputs()), run(sharded, *inputs())


def same(one: Any, other: Any) -> None:
    assert [value is None for value in one] == [value is None for value in other]
    for value, expected in zip(other, one, strict=True):
        if expected is not None:
            torch.testing.assert_close(value, expected)
            assert value.stride() == expected.stride()


def of(model: nn.Module, *tensors: Tensor) -> list[Tensor | None]:
    return [tensor.grad for tensor in (*model.parameters(), *tensors)]


LOSSES: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "a": lambda out: out["a"].square().sum(),
    "b": lambda out: out["b"].square().sum(),
    "y": lambda out: out["y"].sum(),
    "mean": lambda out: out["mean"],
    "a and y": lambda out: out["a"].sum() + out["y"].square().sum(),
    "mean and b": lambda out: out["mean"] * out["b"].sum(),
    "all": lambda out: sum((value.square().mean() for value in out.values()), torch.zeros(())),
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", LOSSES)
def test_what_the_loss_does_not_use_has_no_gradient(name: str, mesh: str) -> None:
    def run(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor | None]:
        LOSSES[name](model(x, y)).backward()
        return of(model, x, y)

    same(*both(mesh, run))


@pytest.mark.parametrize("mesh", MESHES)
def test_gradients_of_some(mesh: str) -> None:
    """Of inputs alone, of what is unused, of what is unused as zeros; of a model whose parameters are all frozen."""

    def run(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor | None]:
        out, scale = model(x, y), model.get_parameter("scale")
        found = [*torch.autograd.grad(out["a"].sum(), [x], retain_graph=True)]
        with pytest.raises(RuntimeError, match="appears to not have been used"):
            torch.autograd.grad(out["a"].sum(), [y], retain_graph=True)
        found += torch.autograd.grad(out["b"].sum(), [x, y, scale], retain_graph=True, allow_unused=True)
        found += torch.autograd.grad(out["y"].sum(), [x, scale, y], materialize_grads=True)
        model.requires_grad_(False)
        return [*found, *torch.autograd.grad(model(x, y)["mean"], [x])]

    same(*both(mesh, run))


@pytest.mark.parametrize("mesh", MESHES)
def test_backward_more_than_once(mesh: str) -> None:
    def run(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor | None]:
        out = model(x, y)
        out["a"].sum().backward(retain_graph=True)
        out["a"].sum().backward(retain_graph=True)
        found = [None if grad is None else grad.clone() for grad in of(model, x, y)]
        out["mean"].backward(retain_graph=True)
        out["b"].sum().backward()
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            out["b"].sum().backward()
        return [*found, *of(model, x, y)]

    same(*both(mesh, run))


def test_zeros_of_an_operator_are_zeros() -> None:
    """A sign has a gradient, which is zero: this is not the same as none."""

    class Signs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(6))
            self.v = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.sign(self.w) * x, self.v * self.w * x

    found: list[list[Tensor | None]] = []
    for model in (Signs(), shardc.shard(Signs(), mesh="a=2")):
        model(torch.ones(4, 6))[0].sum().backward()
        found.append(of(model))
    assert found[0][0] is not None and found[0][1] is None
    same(*found)


def test_a_saved_module_knows_what_has_no_gradient(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Heads().double()
    shardc.compile(model, "dp=2", inputs(), hardware="cpu").save(tmp_path / "heads.py")
    assert "depends_on=(" not in (tmp_path / "heads.py").read_text()  # backward starts from the mean alone

    class Plain(Heads):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            out = super().forward(x, y)
            return out["a"], out["b"], out["y"]

    model = Plain().double()
    shardc.compile(model, "dp=2", inputs(), hardware="cpu").save(tmp_path / "plain.py")
    assert "depends_on=(1,)" in (tmp_path / "plain.py").read_text()
    found: list[list[Tensor | None]] = []
    for run in (model, Executable(load(tmp_path / "plain.py")).bind(model)):
        model.zero_grad()
        x, y = inputs()
        run(x, y)[0].sum().backward()
        found.append([None if grad is None else grad.clone() for grad in of(model, x, y)])
    same(*found)


class ClampsItsBias(nn.Module):
    """Backward does not reach the bias that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.bias.clamp_(-0.05, 0.05)
        return self.second((self.first(x) + self.first.bias).detach())


def test_a_parameter_that_is_changed_and_takes_no_part_has_no_gradient() -> None:
    model = shardc.shard(ClampsItsBias(), mesh="a=2")
    model(torch.randn(6, 4)).sum().backward()
    assert model.first.bias.grad is None and model.second.bias.grad is not None
