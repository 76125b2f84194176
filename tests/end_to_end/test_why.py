"""What plans answer: the same figures as compiling with the alternative as a constraint."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shardc
from samples.textbook import MLP
from shardc.cli import main
from shardc.errors import LayoutError, ShardcError
from shardc.explain.plan import Plan
from shardc.ir.constrain import parse
from shardc.ir.model_call import ModelCall

X = torch.zeros(64, 256)
NAMES = ("up.weight", "down.weight", "input:0", "up", "down", "relu")


def planned(mesh: str = "dp=2,tp=4", x: Tensor = X, model: nn.Module | None = None, **options: object) -> Plan:
    with torch.device("meta"):
        model = MLP(256, 4096) if model is None else model
    return shardc.compile(model, mesh, (x,), hardware="h100", **options).plan  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned()


@pytest.mark.parametrize("layout", ["tp,-", "-,tp", "(dp,tp),-", "(tp,dp),-", "dp,tp", "-,-"])
def test_why_not_agrees_with_a_constraint(plan: Plan, layout: str) -> None:
    """Seconds and conversions are those of a plan that was constrained to the alternative."""
    answer = plan.why_not("up.weight", layout)
    assert plan.why_not("up.weight", [dim or () for dim in parse(layout)]) == answer
    other = planned(constraints={"up.weight": layout})
    assert plan.cost + answer.extra == pytest.approx(other.cost, rel=1e-9)
    assert plan.compute + answer.compute == pytest.approx(other.compute, rel=1e-9)

    def sent(conversions: tuple[shardc.explain.plan.Conversion, ...]) -> Counter[tuple[str, str, float]]:
        return Counter((c.kind, c.axis, c.sent) for c in conversions)

    assert sent(plan.conversions) + sent(answer.added) - sent(answer.removed) == sent(other.conversions)


def test_the_runner_up_is_the_best_of_all_others(plan: Plan) -> None:
    best = plan.why("up.weight").runner_up
    assert best is not None and best.extra >= 0 and best.proven
    specs = ("tp,-", "dp,-", "-,tp", "-,dp", "(dp,tp),-", "(tp,dp),-", "-,-")
    others = [plan.why_not("up.weight", spec) for spec in specs]
    assert best.extra <= min(o.extra for o in others if o.layout != o.chosen) + 1e-15


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_readers_are_those_of_the_plan(plan: Plan, name: str) -> None:
    """What readers are said to need is what the plan emits for that value."""
    answer = plan.why(name)
    emitted = Counter((c.kind, c.axis, c.sent) for c in plan.conversions)
    for step in (*answer.shared, *(step for reader in answer.readers for step in reader.steps)):
        assert emitted[step.kind, step.axis, step.sent], f"{name}: {step} is not in the plan"
    assert str(answer).startswith(f"{name}  {answer.layout}\n")


def test_layouts_are_read_as_they_are_printed(plan: Plan) -> None:
    for name in NAMES:
        layout = plan.why(name).layout
        same = plan.why_not(name, layout)
        assert (same.layout, same.chosen, same.extra) == (layout, layout, 0.0)
        assert "that is the plan" in str(same)


def test_a_value_that_is_not_there(plan: Plan) -> None:
    with pytest.raises(ShardcError, match=r"no value is named 'up.weigth'; nearest: up.weight"):
        plan.why("up.weigth")
    with pytest.raises(ShardcError, match=r"no value is named '\xe4'\. Name a value by the path"):
        plan.why_not("\xe4", "-,-")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("tp", r"1 entry for up.weight of shape \(4096, 256\); give one per dim, or a layout as plans print it"),
        ("pp,-", "mesh dp=2,tp=4 has no axis 'pp'; it has dp, tp"),
        ("f32[4096@pp, 256]", "mesh dp=2,tp=4 has no axis 'pp'"),
        ("f32[4096@tp, 256@tp]", "uses axis 'tp' twice"),
        ("f32[256@tp, 4096]", r"has shape \(256, 4096\); up.weight has \(4096, 256\)"),
        ("f32[", "cannot read layout"),
    ],
)
def test_a_layout_that_cannot_be(plan: Plan, layout: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        plan.why_not("up.weight", layout)


def test_what_stands_against_a_layout() -> None:
    plan = planned(constraints={"up.weight": ("tp", None)})
    answer = plan.why_not("up.weight", "-,tp")
    assert answer.conflict == "forbidden by constraints['up.weight'] on up.weight; drop it, or change it"
    assert plan.why("up.weight").runner_up is None
    assert "no other layout is legal with constraints['up.weight']" in str(plan.why("up.weight"))


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin().sort(dim=1).values.cos()


def test_an_operator_that_cannot_make_a_layout() -> None:
    answer = planned(model=Sorted()).why_not("getitem", "-,tp")
    assert answer.conflict.startswith("aten.sort.default (test_why.py:")
    assert "stay whole in its rule" in answer.conflict and "shardc.constrain" in answer.conflict


def test_a_buffer_that_is_written_in_place() -> None:
    answer = planned(model=nn.BatchNorm1d(256)).why_not("running_mean", "tp")
    assert answer.conflict == "running_mean cannot be split like that: it is written in place and so kept whole"


def test_propagate_mode_compares_nothing() -> None:
    plan = planned(mode="propagate", constraints={"up.weight": ("tp", None)})
    assert "mode='propagate' chose it by the constraints alone" in str(plan.why("down.weight"))
    assert "ask a plan of mode='auto'" in plan.why_not("down.weight", "tp,-").conflict


def test_reused_plans_say_so() -> None:
    compiled = shardc.compile(MLP(8, 32), "dp=2", (torch.zeros(4, 8),), dynamic={"x": {0: "batch"}})
    compiled(torch.zeros(6, 8))
    x = torch.zeros(6, 8)
    reused = compiled.at(ModelCall(MLP(8, 32), (x,), {}), [x]).plan
    assert "reused from other sizes" in str(reused.why("up.weight"))
    with pytest.raises(ShardcError, match="reused from other sizes"):
        reused.why_not("up.weight", "dp,-" if "@" not in reused.why("up.weight").layout else "-,-")


def test_a_saved_plan_has_no_problem_with_it(plan: Plan) -> None:
    loaded = pickle.loads(pickle.dumps(plan))
    assert loaded == plan and str(loaded) == str(plan)
    with pytest.raises(ShardcError, match="unpickled"):
        loaded.why("up.weight")
    with pytest.raises(ShardcError, match="unpickled"):
        copy.copy(plan).why_not("up.weight", "-,-")


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(Path(__file__).parents[2] / "examples" / "mlp.py")
    with_mesh = ["explain", file, "--mesh", "dp=2,tp=2", "--hardware", "h100", "--why"]
    assert main([*with_mesh, "input:0"]) == 0
    assert "read by" in capsys.readouterr().out
    assert main([*with_mesh, "input:0", "--layout", "tp,-"]) == 0
    assert capsys.readouterr().out.startswith("input:0 ")
    assert main([*with_mesh, "input:7"]) == 2
    assert "no value is named 'input:7'; nearest: input:" in capsys.readouterr().err
    assert main(["explain", file, "--mesh", "tp=2", "--constraint", "up=tp,-", "--constraint", "up.weight=tp,-"]) == 0
    assert "by way of up.weight -> addmm" in capsys.readouterr().out
    assert main(["explain", file, "--mesh", "tp=2"]) == 0
    assert capsys.readouterr().out == "what was demanded needs no split dim gathered or moved\n"
    assert main(["explain", file, "--mesh", "tp=2", "--layout", "tp,-"]) == 2
    assert "name the value with --why" in capsys.readouterr().err


class Stack(nn.Module):
    """Residual blocks, all alike."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(256, 4096) for _ in range(count))
        self.downs = nn.ModuleList(nn.Linear(4096, 256) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(x)))
        return x.square().mean()


@pytest.mark.parametrize("mesh", ["dp=2,tp=4", "a=2,b=2,c=2"])
@pytest.mark.parametrize("layers", [1, 12])
def test_check_proves_the_plan_anew(layers: int, mesh: str) -> None:
    """The certificate, whether it came with the solution or is made now, proves what the plan claims; never more."""
    with torch.device("meta"):
        plan = planned(mesh, model=Stack(layers))
    assert plan.lower_bound == plan.cost
    assert plan.cost * (1 - 1e-7) <= plan.check() <= plan.cost
    with pytest.raises(ShardcError, match="unpickled"):
        pickle.loads(pickle.dumps(plan)).check()


def test_a_gradient_that_is_a_later_result_of_its_operator_has_an_answer() -> None:
    """Nobody reads the gradient of the input of the first norm, which comes before that of its weight."""
    plan = planned(mesh="dp=2", model=nn.Sequential(nn.LayerNorm(256, bias=False), MLP(256, 512)))
    assert any(reader.name.startswith("its gradient") for reader in plan.why("0.weight").readers)
    assert plan.why_not("0.weight", "dp").layout == "f32[256@dp]"
