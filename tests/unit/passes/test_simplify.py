"""What `simplify` may not do, and that what it does changes no bit; its cases are in tests/golden/passes/simplify."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import shardc
from checks.compiling import compiled_program
from checks.fuzz import searched
from checks.verifying import snapshots
from samples.grower import AXES, Program
from samples.random_programs import grow
from shardc.analysis.memory import memory_in_order
from shardc.capture.trace import capture
from shardc.cost.hardware import hardware
from shardc.errors import InfeasibleError
from shardc.ir.mesh import Mesh
from shardc.ir.program import Role, value_of
from shardc.passes.codegen import source_of
from shardc.planning.compilation import Compilation
from shardc.runtime import Executable, load

REDUNDANT = (
    lambda v: v.clone(),
    lambda v: v * 1,
    lambda v: v.pow(1) if v.is_floating_point() else v + 0,
    lambda v: v.reshape(-1).reshape(v.shape),
    lambda v: v.unsqueeze(0).reshape(v.shape),
    lambda v: v.transpose(0, -1).transpose(-1, 0) if v.dim() else v.neg().neg(),
    lambda v: torch.cat([v]) if v.dim() else v.to(v.dtype, copy=True),
    lambda v: v[:] if v.dim() else v[None][0],
)


def bits(x: Tensor) -> bytes:
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def run(c: Compilation, state: nn.Module, inputs: Sequence[Tensor]) -> list[bytes]:
    """Bits of outputs and gradients of what a pass left, as code."""
    executable = Executable(load(source_of(c.lowered.read(), c.program, c.mesh)))
    torch.manual_seed(0)
    outputs = executable.bind(state)(*inputs)
    starts = [outputs[slot.index] for slot in executable.tangents]
    wanted = [one for one in (*state.parameters(), *inputs) if one.requires_grad]
    found: list[Tensor | None] = []
    if starts:
        found += torch.autograd.grad(starts, wanted, list(map(torch.ones_like, starts)), allow_unused=True)
    return [bits(one) for one in (*outputs, *found) if one is not None]


def calls(c: Compilation) -> int:
    return sum(node.op == "call_function" for node in c.lowered.read().nodes)


def peak(c: Compilation) -> float:
    return memory_in_order(c.lowered.read(), c.program, c.mesh, c.states).peak


def redundant(program: Program, random: Random) -> Program:
    """The program with steps that change nothing, or are made twice."""
    for place, (name, function, operands) in enumerate(program.steps):
        if name.startswith("constrain") or random.random() < 0.3:
            continue
        more = random.choice(REDUNDANT)

        def twice(*values: Tensor, make=function, more=more) -> Tensor:  # type: ignore[no-untyped-def]
            first, second = make(*values), more(make(*values))
            return torch.where(first == first, second, first)

        once = random.random() < 0.5
        changed = (lambda *values, make=function, more=more: more(make(*values))) if once else twice
        program.steps[place] = name, changed, operands
    return program


def test_random_programs_keep_every_bit() -> None:
    counted = {"before": 0, "after": 0}

    @searched(8, shrink=False)
    @given(random=st.randoms(use_true_random=False))
    def search(random: Random) -> None:
        program, inputs = grow(random, ("pointwise", "view", "contraction", "shape", "reduction"), 5, 2)
        program = redundant(program, random)
        outputs = program(*inputs)
        started = frozenset(i for i, o in enumerate(outputs) if o.requires_grad and (i == 0 or not program.with_loss))
        captured = capture(program, tuple(inputs), differentiable=started)
        mesh = Mesh(tuple(zip(AXES, random.choice(((2, 2), (2, 3), (4, 1))), strict=False)))
        try:
            made = compiled_program(captured, mesh, hardware("cpu"), whole=random.random() < 0.5, model=program)
        except InfeasibleError:  # some constraints cannot be met on some meshes
            assert any(name.startswith("constrain") for name, _, _ in program.steps), str(program)
            return
        before, after = made["localize"], made["simplify"]
        assert run(before, program, inputs) == run(after, program, inputs), f"{program}\n{made['codegen'].code()}"
        assert peak(after) <= peak(before)
        counted["before"] += calls(before)
        counted["after"] += calls(after)

    search()
    assert counted["after"] < 0.97 * counted["before"], counted


@pytest.mark.parametrize("case", ["memory", "normed", "lookup"])
def test_small_models_keep_every_bit(case: str) -> None:
    made = snapshots(case)
    before, after = made["localize"], made["simplify"]
    ports = zip(before.program.inputs, before.program.placeholders, strict=True)
    values = [value_of(node) for port, node in ports if port.role is Role.INPUT]
    inputs = [torch.randn(v.shape) if v.is_floating_point() else torch.randint(0, 8, v.shape) for v in values]
    assert run(before, before.call.model, inputs) == run(after, before.call.model, inputs)
    assert peak(after) <= peak(before)


class Copies(nn.Module):
    """A result twice, an input as it is, and a copy of an input that backward reads."""

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = torch.exp(x)
        return y, torch.exp(x), w.clone(), w * 1.0, x.clone() * w.clone()


def test_what_the_user_may_write_to_is_apart() -> None:
    compiled = shardc.compile(Copies(), "dp=2", (torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)))
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    outputs = compiled(x, w)
    places = [one.untyped_storage().data_ptr() for one in (x, w, *outputs)]
    assert len(set(places)) == len(places)
    before = w.clone()
    w.zero_()  # as on one device: backward has a copy
    outputs[4].sum().backward()
    assert x.grad is not None and torch.equal(x.grad, before)


class Regrouped(nn.Module):
    """A view of a value whose minor atom was split: reshard views it as four dims, gathers, and views it back."""

    def forward(self, x: Tensor) -> Tensor:
        y = shardc.constrain(x.sin(), (None, None, None, "a")).view(2, 2, 6).exp()
        return shardc.constrain(y.view(6, 2, 2), (None, None, None)).cos()


def test_a_view_reads_what_another_view_only_regrouped() -> None:
    x = torch.randn(2, 2, 3, 2)
    compiled = shardc.compile(Regrouped(), "a=2", (x,), mode="propagate")
    before, after = compiled.graph("localize"), compiled.graph("simplify")
    assert "= view(%all_gather, [6, 2, 2])" in after and "= view(%all_gather, [6, 2, 2])" not in before
    torch.testing.assert_close(compiled(x), Regrouped()(x))


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rand(8) * x + torch.rand(8)


def test_draws_are_made_each() -> None:
    compiled = shardc.compile(Draws(), "dp=2", (torch.ones(8),))
    torch.manual_seed(0)
    expected = Draws()(torch.ones(8))
    torch.manual_seed(0)
    assert torch.equal(compiled(torch.ones(8)), expected)


def test_what_is_predicted_is_of_what_is_left() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(torch.relu(x) * 1.0)

    plan = shardc.compile(Scaled(), "dp=2", (torch.ones(64, 64),), outputs="sharded").plan
    assert plan.simplified > 0.0
    assert plan.predicted == pytest.approx(plan.cost - plan.simplified)
    assert plan.simplified == pytest.approx(plan.compute / 2)
    assert "it charges operators that the code does without" in str(plan)
