"""What a person does with `compile`: constraints, modes, the generated code and the graph after every pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import shardc
from samples.pairs import MESH, MLP, Tied, inputs, pair
from shardc import constrain
from shardc.passes.pipeline import PASSES

ROOT = Path(__file__).parents[2]


def layout_of(compiled: shardc.api.Compiled, name: str) -> str:
    return str(next(placed for placed in compiled.plan.placed if placed.name == name).layout)


def test_constraint_on_the_other_name_of_a_tied_weight() -> None:
    model = Tied()
    i = torch.arange(8).view(2, 4)
    compiled = shardc.compile(model, MESH, (i,), constraints={"embed.weight": ("tp", None)})
    assert layout_of(compiled, "embed.weight") == "[16@tp, 8]"
    torch.testing.assert_close(compiled(i), model(i))


def test_sharded_outputs_stay_split() -> None:
    single, _ = pair()
    x = inputs(8, 8)
    compiled = shardc.compile(single, "dp=4", (x,), outputs="sharded", constraints={"down": ("dp", None)})
    slot = next(s for s in compiled.executable.outputs if s.role == "output")
    assert slot.cuts == ((0, 1, "dp"),)
    torch.testing.assert_close(compiled(x), single(x))


def test_saved_code_runs_without_the_compiler(tmp_path: Path) -> None:
    single, _ = pair()
    x = inputs()
    compiled = shardc.compile(single, MESH, (x,))
    compiled.save(tmp_path / "generated.py")
    torch.save((single.state_dict(), x, single(x).detach()), tmp_path / "data.pt")
    script = f"""
import sys
import torch
from shardc.runtime import Executable, load
state, x, expected = torch.load({str(tmp_path / "data.pt")!r})
for source in ({str(tmp_path / "generated.py")!r}, None):
    if source is None:
        sys.path.insert(0, {str(tmp_path)!r})
        import generated as module
    else:
        module = load(source)
    (found,) = Executable(module).run(state, [x])
    torch.testing.assert_close(found, expected)
loaded = {{name for name in sys.modules if name.startswith("shardc") and not name.startswith("shardc.runtime")}}
print("of shardc:", sorted(loaded))
compiler = ("z3", "scipy", "shardc.api", "shardc.solver", "shardc.passes")
print("compiler:", [name for name in compiler if name in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "of shardc: ['shardc']\ncompiler: []\n"


def test_plan_code_and_the_graph_after_every_pass() -> None:
    compiled = shardc.compile(MLP(), MESH, (torch.zeros(4, 8),), hardware="h100")
    text = str(compiled.plan)
    assert "plan for mesh dp=2,tp=2 on h100, mode=auto" in text and "proven optimal" in text
    assert re.search(r"up\.weight +f32\[16", text) and re.search(r"input:0 +f32\[4", text)
    assert "def forward(" in compiled.code and "def backward(" in compiled.code
    for name in PASSES:
        graph = compiled.graph(name)
        assert graph.strip(), name
        if name != "codegen":
            assert graph.startswith("%") and "return" in graph
    assert "pairs.py:" in compiled.graph("capture")
    assert compiled.graph("codegen") == compiled.code


def test_propagate_mode_spreads_what_is_annotated() -> None:
    compiled = shardc.compile(
        MLP(),
        MESH,
        (torch.zeros(4, 8),),
        mode="propagate",
        constraints={"up.weight": ("tp", None), "down": ("dp", None)},
    )
    assert layout_of(compiled, "up.weight") == "[16@tp, 8]"
    assert layout_of(compiled, "up.bias") == "[16@tp]"
    assert layout_of(compiled, "down.weight") == "[8, 16@tp]"
    assert layout_of(compiled, "input:0") == "[4@dp, 8]"


def test_propagate_mode_without_annotations_keeps_everything_whole() -> None:
    compiled = shardc.compile(MLP(), MESH, (torch.zeros(4, 8),), mode="propagate")
    assert all("@" not in str(placed.layout) for placed in compiled.plan.placed)
    assert not any(compiled.plan.bytes_per_axis.values())


def constrained(compiled: shardc.api.Compiled) -> set[str]:
    """The layouts of the values that a constraint names."""
    lines = [line for line in compiled.graph("reshard").splitlines() if "= constrain(" in line]
    return {match[1] for line in lines if (match := re.search(r"f64(\[[^\]]*\])", line))}


@pytest.mark.parametrize("mode", ["auto", "propagate"])
@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        (("dp", "tp"), r"\[4@dp, 16@tp\]"),
        ((("dp", "tp"), None), r"\[4@\(dp,tp\), 16\]"),
        (("?", "tp"), r"\[4(@dp)?, 16@tp\]"),
        ((None, ("tp", "dp")), r"\[4, 16@\(tp,dp\)\]"),
    ],
)
def test_what_is_constrained_in_the_code_lies_so(mode: str, spec: tuple[object, ...], pattern: str) -> None:
    class Model(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(constrain(torch.relu(self.up(x)), spec))

    model = Model().double()
    x = inputs(4, 8)
    compiled = shardc.compile(model, MESH, (x,), mode=mode)
    torch.testing.assert_close(compiled(x), model(x))
    found = constrained(compiled)
    assert found and all(re.fullmatch(pattern, layout) for layout in found), found


@pytest.mark.parametrize("mode", ["auto", "propagate"])
def test_what_is_constrained_from_outside_lies_so(mode: str) -> None:
    model = MLP().double()
    x = inputs(4, 8)
    constraints = {"*.weight": ("dp", None), "up.bias": ("tp",), "up": ("tp", "dp")}
    compiled = shardc.compile(model, MESH, (x,), mode=mode, constraints=constraints)
    assert layout_of(compiled, "up.weight") == "[16@dp, 8]"
    assert layout_of(compiled, "down.weight") == "[8@dp, 16]"
    assert layout_of(compiled, "up.bias") == "[16@tp]"
    assert constrained(compiled) == {"[4@tp, 16@dp]"}
    torch.testing.assert_close(compiled(x), model(x))


def test_gradients_arrive_in_the_layout_of_their_parameter() -> None:
    compiled = shardc.compile(MLP(), MESH, (torch.zeros(4, 8),), constraints={"up.weight": (("tp", "dp"), None)})
    cuts = {slot.name: slot.cuts for slot in compiled.executable.inputs if slot.role == "parameter"}
    assert cuts["up.weight"] == ((0, 1, "tp"), (0, 1, "dp"))
    assert {slot.name: slot.cuts for slot in compiled.executable.gradients} == cuts
