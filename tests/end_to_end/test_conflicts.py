"""What cannot hold together without conversions: kinds of conflict, their members, and that they are minimal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc
from shardc import constrain
from shardc.cost.conversion import TensorClass
from shardc.cost.hardware import Hardware
from shardc.errors import InfeasibleError
from shardc.explain.plan import Plan
from shardc.explain.why import Questions


@torch.library.custom_op("shardc_tests::evenly_only", mutates_args=())
def even_op(x: Tensor) -> Tensor:
    """An operator of which nobody knows what it makes of padding."""
    return x.exp()


@even_op.register_fake
def _even_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


shardc.rule(even_op, "a b -> a b")


class Written(nn.Module):
    """A module of one function, with a weight and a buffer for it."""

    def __init__(self, function: Callable[[Written, Tensor], Tensor], rows: int = 8, columns: int = 8) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.zeros(rows, columns))
        self.register_buffer("kept", torch.zeros(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def chain(m: Written, x: Tensor) -> Tensor:
    x = constrain(x.sin(), ("a", "?"))
    x = (x.cos() + 1).view(4, 2, 8).permute(1, 0, 2)
    return constrain(x.exp(), ("?", None, "?")).sum()


def orders(m: Written, x: Tensor) -> Tensor:
    return (constrain(x.sin(), ("a", None)) + constrain(x.cos(), ("b", None))).sum()


def two_orders(m: Written, x: Tensor) -> Tensor:
    return constrain(constrain(x.sin(), (("a", "b"), None)).cos(), (("b", "a"), None)).sum()


def whole_dim(m: Written, x: Tensor) -> Tensor:
    return constrain(x, ("?", "a")).sort(dim=1).values.sum()


def two_factors(m: Written, x: Tensor) -> Tensor:
    return (constrain(x, ("a", "?")) @ m.weight).sum()


def weight_and_value(m: Written, x: Tensor) -> Tensor:
    return constrain(x @ m.weight, ("?", None)).sum()


def output(m: Written, x: Tensor) -> Tensor:
    return constrain(x.sin(), ("a", "?"))


def even_only(m: Written, x: Tensor) -> Tensor:
    return even_op(constrain(x[:7], ("a", "?"))).sum()


def too_small(m: Written, x: Tensor) -> Tensor:
    return (constrain(x[:3], ("a", "?")).sin() * constrain(x[:3], ("b", "?")).cos()).sum()


def window(m: Written, x: Tensor) -> Tensor:
    return F.max_pool1d(constrain(x, ("?", "a"))[None], kernel_size=3, stride=1).sum()


def gradient(m: Written, x: Tensor) -> Tensor:
    return constrain(m.weight * 2, ("a", None)).mul(x).sum()


def buffer(m: Written, x: Tensor) -> Tensor:
    m.kept.copy_(constrain(x.sin(), ("a", None)))
    return x.sum()


def embedding(m: Written, x: Tensor) -> Tensor:
    return constrain(F.embedding(x.long(), m.weight), ("?", "?", None)).sum()


def itself(m: Written, x: Tensor) -> Tensor:
    x = constrain(x, ("a", "?"))
    return (x @ x.t()).sum()


def reused(m: Written, x: Tensor) -> Tensor:
    return constrain(x * m.weight, (None, "?")).sum() + constrain(m.weight.t() * x, ("?", "b")).sum()


@dataclass(frozen=True)
class Case:
    function: Callable[[Written, Tensor], Tensor]
    members: tuple[str, ...]
    """How the members begin."""
    constraints: dict[str, Any] = field(default_factory=dict[str, Any])
    where: str = ""
    shape: tuple[int, int] = (8, 8)


def told(spec: str) -> str:
    return f"constrain(..., {spec}) at test_conflicts.py:"


KINDS = {
    "split, then whole, through a chain of operators": Case(chain, (told("a,?"), told("?,-,?")), where="exp"),
    "two axes that both come first": Case(orders, (told("a,-"), told("b,-")), where="add"),
    "two orders of the axes": Case(two_orders, (told("(a,b),-"), told("(b,a),-"))),
    "an operator that keeps the dim whole": Case(whole_dim, (told("?,a"), "aten.sort.default at test_conflicts.py:")),
    "one axis on two factors of a product": Case(
        two_factors, (told("a,?"), "constraints['weight'] = ?,a"), {"weight": ("?", "a")}, "a would split both n and m"
    ),
    "a weight and the value that it makes": Case(
        weight_and_value, (told("?,-"), "constraints['weight'] = ?,a"), {"weight": ("?", "a")}, "mm"
    ),
    "an output that comes back whole": Case(
        output, (told("a,?"), "output 0 is gathered whole (outputs='auto': it is small)")
    ),
    "an operator that cannot pad": Case(even_only, (told("a,?"), "shardc_tests.evenly_only.default at test_")),
    "fewer elements than the ranks of two axes": Case(too_small, (told("a,?"), told("b,?")), where="mul"),
    "a window over the dim": Case(window, (told("?,a"), "aten.max_pool2d_with_indices.default at test_conflicts.py:")),
    "a gradient that follows its parameter": Case(
        gradient,
        ("constraints['weight'] = -,-", told("a,-"), "the gradient of weight has the layout of weight"),
        {"weight": (None, None)},
    ),
    "a buffer that is written in place": Case(buffer, (told("a,-"), "the buffer kept is written in place")),
    "a table and what is looked up in it": Case(
        embedding, (told("?,?,-"), "constraints['weight'] = ?,b"), {"weight": ("?", "b")}, "embedding"
    ),
    "a value with itself": Case(itself, (told("a,?"),), where="a would split both m and n"),
    "a weight that is used twice": Case(
        reused, (told("-,?"), "constraints['weight'] = a,?"), {"weight": ("a", "?")}, "mul"
    ),
}  # fmt: skip


def planned(case: Case) -> Plan:
    inputs = (torch.ones(case.shape),)
    return shardc.compile(Written(case.function), "a=2,b=2", inputs, constraints=case.constraints).plan


@pytest.mark.parametrize("kind", KINDS)
def test_conflict(kind: str) -> None:
    """The expected members; and as a set they cannot hold together, while without any one of them the others can."""
    case = KINDS[kind]
    plan = planned(case)
    found = [c for c in plan.conflicts() if all(any(m.startswith(e) for m in c.members) for e in case.members)]
    assert found, "\n".join(map(str, plan.conflicts()))
    conflict = found[0]
    assert len(conflict.members) == len(case.members)
    assert case.where in str(conflict)
    assert isinstance(plan.explainer, Questions)
    finder = plan.explainer.conflict_finder()
    assert finder.core(conflict.members) is not None
    for member in conflict.members:
        assert finder.core([m for m in conflict.members if m != member]) is None


@pytest.fixture
def no_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world in which no split dim can be gathered or moved."""
    seconds = TensorClass.seconds.func

    def without(tensor: TensorClass) -> np.ndarray:
        table = seconds(tensor).copy()
        for i, start in enumerate(tensor.layouts):
            for j, end in enumerate(tensor.layouts):
                if any(there[: len(here)] != here for here, there in zip(start.axes, end.axes, strict=True)):
                    table[i, j] = np.inf
        return table

    replaced = cached_property(without)
    replaced.__set_name__(TensorClass, "seconds")
    monkeypatch.setattr(TensorClass, "seconds", replaced)
    monkeypatch.setattr(Hardware, "hiding", lambda *_: ())  # a ring gathers inside a product


@pytest.mark.parametrize("kind", KINDS)
def test_the_solver_agrees(kind: str, no_gathers: None) -> None:
    """Where z3 finds a conflict, the exact solver finds no plan without gathers, and the other way round."""
    with pytest.raises(InfeasibleError):
        planned(KINDS[kind])


def test_the_solver_agrees_where_there_is_none(no_gathers: None) -> None:
    test_reductions_are_no_conflict()
    test_without_demands_there_is_no_conflict()


def test_reductions_are_no_conflict() -> None:
    """Columns then rows: what is demanded costs an all-reduce, and nothing is gathered or moved."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
    constraints = {"0.weight": ("a", None), "2.weight": (None, "a")}
    assert shardc.compile(model, "a=2", (torch.zeros(4, 8),), constraints=constraints).plan.conflicts() == ()


def test_without_demands_there_is_no_conflict() -> None:
    assert shardc.compile(nn.Linear(8, 8), "a=2,b=2", (torch.zeros(4, 8),)).plan.conflicts() == ()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x)).sum()


def test_tied_weights_that_are_demanded_differently() -> None:
    """No conversion can help a weight that is stored once: an error, with both demands and what they say."""
    constraints = {"tokens.weight": ("a", None), "head.weight": (None, "a"), "tok*": ("a", "?")}
    with pytest.raises(InfeasibleError) as caught:
        shardc.compile(Tied(), "a=2,b=2", (torch.zeros(4, dtype=torch.long),), constraints=constraints)
    assert str(caught.value) == (
        "these constraints contradict each other; drop or change any one of them:\n"
        "  - constraints['tokens.weight'] on tokens.weight: a,-\n"
        "  - constraints['head.weight'] on head.weight: -,a"
    )
