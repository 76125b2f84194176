"""Which variant runs depends on the hardware and the memory; the plan says so, and the values are right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardc
from samples import paired_operator as paired
from shardc.api import Compiled
from shardc.cost.hardware import Hardware, Link
from shardc.explain.chosen_strategy import ways_to_run
from shardc.explain.why import Questions
from shardc.planning.solved import Solved
from shardc.rules.factors.strategy import PLAIN

FLOPS = {"float32": 1e12, "float64": 1e12}
FAR = Hardware("far apart", FLOPS, 1e12, 1e-6, 8, Link(1e-3, 1e9), Link(1e-3, 1e9))
NARROW = Hardware("narrow", FLOPS, 1e12, 1e-6, 8, Link(1e-9, 1e6), Link(1e-9, 1e6))


class Columns(nn.Module):
    """`work` along a dim that is demanded split before and after."""

    def __init__(self, work: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.work = work

    def forward(self, x: Tensor) -> Tensor:
        return shardc.constrain(self.work(shardc.constrain(x.sin(), (None, "tp")), 1), (None, "tp"))


WORKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": F.softmax,
    "log_softmax": F.log_softmax,
    "safe_softmax": torch.ops.aten._safe_softmax.default,
    "logsumexp": lambda x, dim: x - x.logsumexp(dim, keepdim=True),
}


def planned(work: str, device: Hardware, ways: int = 8, rows: int = 64, columns: int = 203) -> Compiled:
    x = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Columns(WORKS[work])
    compiled = shardc.compile(model, f"tp={ways}", (x,), hardware=device)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-10)
    return compiled


@pytest.mark.parametrize("work", WORKS)
def test_the_hardware_decides_which_variant_runs(work: str) -> None:
    far, narrow = planned(work, FAR), planned(work, NARROW)
    assert f" {work}_gathered(" in far.code and f" {work}(" not in far.code
    assert f" {work}(" in narrow.code and f"{work}_gathered(" not in narrow.code


def test_the_number_of_ranks_decides_too() -> None:
    """Two ranks send as much in one all-gather as in two all-reduces; more ranks send more."""
    assert "softmax_gathered(" in planned("softmax", NARROW, ways=2).code
    assert "softmax_gathered(" not in planned("softmax", NARROW, ways=4).code


@pytest.mark.parametrize(("device", "runs", "other"), [
    (FAR, "all_gather", "all_reduce"), (NARROW, "all_reduce", "all_gather"),
])  # fmt: skip
def test_why_names_the_variant_and_what_the_other_would_cost(device: Hardware, runs: str, other: str) -> None:
    compiled = planned("softmax", device)
    answer = compiled.plan.why("softmax")
    assert answer.strategy == f"tp splits s ({runs})"
    assert [way.variant for way in answer.ways] == [runs, other]
    assert 0 < answer.ways[0].seconds < answer.ways[1].seconds
    assert f"variant    {runs}, which sends for" in str(answer) and f"; {other} would send for" in str(answer)


def test_one_variant_is_not_spoken_of() -> None:
    answer = shardc.compile(nn.Linear(8, 8), "tp=2", (torch.zeros(4, 8),)).plan.why("weight")
    assert answer.ways == () and "\n  variant " not in str(answer)


def test_the_difference_is_in_the_objective() -> None:
    """Where the other variant is the only one, the plan is dearer by what the answer tells."""
    questions = planned("softmax", FAR).plan.explainer
    assert isinstance(questions, Questions) and questions.solution is not None
    network = questions.network
    node, chosen = next((n, s) for n, s in questions.assignment.strategies.items() if s.variant != PLAIN)
    problem, variable = network.problem(), network.variable_of(node)
    wanted = [s == chosen._replace(variant="all_reduce") for s in network.variables[variable].domain]
    assert sum(wanted) == 1
    problem.unary[variable] = np.where(wanted, problem.unary[variable], np.inf)
    other = Solved(network, questions.solution).again(problem)
    runs, would = ways_to_run(network.options_of(questions.ops[node]), chosen)
    assert (runs.variant, would.variant) == ("all_gather", "all_reduce")
    assert other.cost - questions.solution.cost == pytest.approx(would.seconds - runs.seconds, rel=1e-6)


class Mixed(nn.Module):
    def __init__(self, operator: Callable[..., Tensor]) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        x, y, w = (shardc.constrain(value.sin(), ("cp", None)) for value in (x, y, w))
        return shardc.constrain(self.operator(x, y, w), ("cp", None)).cos()


def mixed(operator: Callable[..., Tensor], mesh: str = "cp=4", rows: int = 16, **more: object) -> Compiled:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 8), (2 * rows, 8), (rows, 2 * rows))
    inputs = tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    model = Mixed(operator)
    compiled = shardc.compile(model, mesh, inputs, **{"hardware": FAR, **more})  # type: ignore[arg-type]
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-10, atol=1e-10)
    return compiled


@pytest.mark.parametrize(("mesh", "rows"), [("cp=4", 16), ("cp=4", 18), ("dp=2,cp=3", 18)])
def test_an_axis_splits_two_factors_together(mesh: str, rows: int) -> None:
    compiled = mixed(torch.ops.paired.prefix_mix.default, mesh, rows)
    assert "from samples.paired_operator import prefix_mix_in_parts" in compiled.code
    call = next(line for line in compiled.code.splitlines() if "prefix_mix_in_parts(" in line)
    assert f'i=Part(("cp",), {rows})' in call and f'j=Part(("cp",), {2 * rows})' in call
    assert not [c for c in compiled.plan.conversions if c.kind == "all_gather" and c.place and "mix" in c.place]


def test_memory_decides_which_variant_runs() -> None:
    """The quick variant allocates more than there is."""
    free = mixed(torch.ops.paired.prefix_mix_two_ways.default)
    assert "prefix_mix_in_parts(" in free.code
    tight = mixed(torch.ops.paired.prefix_mix_two_ways.default, memory=0.5 * free.plan.memory.peak)
    assert "prefix_mix_frugal(" in tight.code
    assert free.plan.memory.peak > paired.SCRATCH * 8 * 8 > tight.plan.memory.peak
    assert tight.plan.cost > free.plan.cost
