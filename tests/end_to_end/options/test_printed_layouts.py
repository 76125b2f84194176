"""A layout as plans print it is a constraint: of parameters, of modules, of values in the code, on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc.cli import main
from shardc.errors import InfeasibleError, LayoutError

MESH = "dp=2,tp=2"
FILE = str(Path(__file__).parents[3] / "examples/mlp.py")


class Tokens(nn.Module):
    """The batch and the sequence merge in the middle."""

    def __init__(self, spec: Any = None) -> None:
        super().__init__()
        self.up, self.spec = nn.Linear(64, 256, bias=False), spec

    def forward(self, x: Tensor) -> Tensor:
        rows = self.up(x).flatten(0, 1)
        if self.spec is not None:
            rows = shardc.constrain(rows, self.spec)
        return torch.relu(rows).view(8, 16, 256)


def compiled(spec: Any = None, mode: str = "propagate", **constraints: Any) -> shardc.Compiled:
    """With constraints on `up_weight` and `up`."""
    named = {name.replace("_", "."): value for name, value in constraints.items()}
    x = torch.zeros(8, 16, 64)
    return shardc.compile(Tokens(spec), MESH, (x,), constraints=named, mode=mode)  # type: ignore[arg-type]


def made(program: shardc.Compiled, name: str) -> str:
    (line,) = [line for line in program.graph("reshard").splitlines() if line.startswith(f"%{name} = ")]
    return next(word for word in line.split("  ") if word.strip().startswith("f32[")).strip()


def test_it_means_what_the_spec_means() -> None:
    for printed, spec in (("f32[256@tp, 64]", "tp,-"), ("[256, 64@(dp,tp)]", (None, ("dp", "tp")))):
        one, other = compiled(up_weight=printed), compiled(up_weight=spec)
        assert one.plan.placed == other.plan.placed and one.code.count("all_") == other.code.count("all_")
    assert made(compiled(up="f32[8@dp, 16, 256@tp]"), "constrain") == "f32[8@dp, 16, 256@tp]"


def test_every_layout_that_a_plan_prints_for_a_parameter_is_taken_back() -> None:
    for placed in shardc.compile(Tokens(), MESH, (torch.zeros(8, 16, 64),), hardware="h100").plan.placed:
        if placed.role == "parameter":
            text = f"{placed.dtype}{placed.layout}"
            assert placed in compiled(mode="auto", **{placed.name.replace(".", "_"): text}).plan.placed


@pytest.mark.parametrize(
    "layout", ["f32[(8@dp 16@tp), 256]", "f32[(8 16@tp), 256@dp]", "f32[128@(dp,tp), 256]", "f32[(8 16@(tp,dp)), 256]"]
)
def test_it_says_which_piece_of_a_dim_is_split(layout: str) -> None:
    assert made(compiled(layout), "constrain") == layout
    assert made(compiled(layout, mode="auto"), "constrain") == layout


def test_the_text_is_read_not_compared() -> None:
    """The two pieces of 2 and 64 are one of 128 split by both."""
    assert made(compiled("f32[(2@dp 64@tp), 256]"), "constrain") == "f32[128@(dp,tp), 256]"


@pytest.mark.parametrize(
    ("layout", "error", "told"),
    [
        ("f32[64@dp, 256]", LayoutError, r"\[64@dp, 256\] is a layout of shape \(64, 256\); the value has shape \(128"),
        ("f32[(32 4@tp), 256]", InfeasibleError, "cuts dim 0 into 32 x 4, and the model uses it as 8 x 16"),
        ("f32[128@xp, 256]", LayoutError, "has no axis 'xp'"),
        ("f32[128@dp, 256@dp]", LayoutError, "axis 'dp'"),
        ("f32[128, 256] +sum@dp", LayoutError, "cannot leave a value in parts"),
    ],
)
def test_what_a_value_cannot_be(layout: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        compiled(layout)


def test_two_that_split_other_pieces_contradict_each_other() -> None:
    class Twice(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            rows = shardc.constrain(self.up(x).flatten(0, 1), "f32[(8@dp 16), 256]")
            return shardc.constrain(rows, "f32[(8 16@dp), 256]")

    plan = shardc.compile(
        Twice(), MESH, (torch.zeros(8, 16, 64),), mode="propagate"
    ).plan  # two values: one is converted to the other
    assert {c.kind for c in plan.conversions} >= {"all_to_all"}
    for other in ("f32[256, 64@tp]", "-,tp"):
        with pytest.raises(InfeasibleError, match="contradict each other"):
            constraints = {"up.weight": "f32[256@tp, 64]", "*.weight": other}
            shardc.compile(Tokens(), MESH, (torch.zeros(8, 16, 64),), constraints=constraints)


def test_the_command_line_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    shown = ["plan", FILE, "--mesh", "tp=4", "--constraint"]
    texts: list[str] = []
    for spec in ("up.weight=f32[1024@tp, 256]", "up.weight=tp,-"):
        assert main([*shown, spec]) == 0
        texts.append(capsys.readouterr().out.partition("compiled in")[0])
    assert texts[0] == texts[1] and "up.weight    f32[1024@tp, 256]" in texts[0]


@pytest.mark.parametrize("layout", [["--layout", "-,tp"], ["--layout=-,tp"], ["--layout", "f32[1024, 256@tp]"]])
def test_a_layout_that_begins_with_a_dash_is_no_flag(layout: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", FILE, "--mesh", "tp=4", "--why", "up.weight", *layout]) == 0
    assert "up.weight as f32[1024, 256@tp] instead of" in capsys.readouterr().out
