"""Generated code calls torch's operators without the layers around them, but for those that users' bodies need."""

from __future__ import annotations

import sys
from types import BuiltinFunctionType, ModuleType

import pytest
import torch
from torch import Tensor

from shardc.runtime import VirtualMesh, load
from shardc.runtime.execute.direct import call_directly

PLAIN = """
import torch
from collections.abc import Sequence
from shardc.runtime import all_reduce
aten = torch.ops.aten
def forward(x):
    with torch.enable_grad():
        doubled = aten.mul.Tensor(x, 2)
    return all_reduce(doubled, axis="a"), x.reshape(-1)
"""
WITH_BODY = "from bodies_of_a_user import slope\ndef forward(x):\n    return slope(x)\n"


def slope(x: Tensor) -> Tensor:
    """The gradient of the sum of squares, taken in the body itself."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(x.square().sum(), x)[0]


def ran(source: str, x: Tensor, ranks: int = 2) -> list[object]:
    module = load(source)
    call_directly(module)
    return VirtualMesh({"a": ranks}).run(module.forward, lambda _: (x,))


def test_nothing_is_recorded_and_nothing_is_between() -> None:
    module = load(PLAIN)
    call_directly(module)
    call_directly(module)
    assert isinstance(module.aten.mul.Tensor, BuiltinFunctionType)
    x = torch.ones(2, 3, requires_grad=True)
    for reduced, viewed in ran(PLAIN, x):  # type: ignore[attr-defined]
        assert torch.equal(reduced, torch.full((2, 3), 4.0)) and not reduced.requires_grad
        assert viewed._base is x  # writing to one is still seen at the other
    assert (x * 2).requires_grad


def test_the_operator_of_a_user_may_differentiate() -> None:
    library = torch.library.Library("operators_of_a_user", "DEF")
    library.define("slope(Tensor x) -> Tensor")
    library.impl("slope", slope, "CPU")
    x = torch.arange(3.0)
    source = "import torch\ndef forward(x):\n    return torch.ops.operators_of_a_user.slope.default(x)\n"
    assert all(torch.equal(one, 2 * x) for one in ran(source, x))  # type: ignore[arg-type]


def test_the_body_of_a_user_may_differentiate(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ModuleType("bodies_of_a_user")
    theirs.slope = slope  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bodies_of_a_user", theirs)
    x = torch.arange(3.0)
    assert all(torch.equal(one, 2 * x) for one in ran(WITH_BODY, x))  # type: ignore[arg-type]
