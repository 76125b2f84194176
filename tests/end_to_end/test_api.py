"""What a person does with `shard` and `compile`, on models small enough to read."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc import constrain, shard
from shardc.passes.pipeline import PASSES

ROOT = Path(__file__).parents[2]
MESH = "dp=2,tp=2"


class MLP(nn.Module):
    """Module level, so that it can be pickled."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@shard(mesh=MESH)
class Decorated(MLP):
    """The decorator on a class."""


def pair(make: Callable[[], nn.Module] = MLP, **options: object) -> tuple[nn.Module, nn.Module]:
    """The same model single and sharded."""
    torch.manual_seed(0)
    single = make().double()
    return single, shard(copy.deepcopy(single), mesh=MESH, **options)  # type: ignore[arg-type]


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape or (4, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check(single: nn.Module, model: nn.Module, *x: Tensor) -> None:
    """Same output and, after backward, the same gradients."""
    for part in (single, model):
        part.zero_grad()
    one, other = single(*x), model(*x)
    torch.testing.assert_close(one, other)
    one.square().sum().backward()
    other.square().sum().backward()
    for (name, left), right in zip(single.named_parameters(), model.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None), name
        if left.grad is not None:
            torch.testing.assert_close(left.grad, right.grad)


def test_on_an_instance_keeps_paths_class_and_state() -> None:
    single, model = pair()
    assert isinstance(model, MLP) and type(model).__name__ == "MLP"
    assert list(model.state_dict()) == list(single.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in single.named_modules()]
    check(single, model, inputs())


def test_on_a_class() -> None:
    model = Decorated().double()
    single = MLP().double()
    single.load_state_dict(model.state_dict())
    check(single, model, inputs())
    assert str(model.plan.mesh) == MESH


def test_each_instance_of_a_class_has_its_own_plan() -> None:
    one, other = Decorated(), Decorated(12)
    one(torch.zeros(2, 8))
    other(torch.zeros(6, 12))
    assert one.plan is not other.plan
    assert "12" in other.graph("capture") and "[2, 12]" not in one.graph("capture")


def test_on_a_function() -> None:
    @shard(mesh=MESH)
    def attention(q: Tensor, k: Tensor, *, scale: float) -> Tensor:
        return torch.softmax(q @ k.T * scale, -1)

    q, k = inputs(4, 8).requires_grad_(), inputs(6, 8)
    found = attention(q, k, scale=0.5)
    expected = torch.softmax(q @ k.T * 0.5, -1)
    torch.testing.assert_close(found, expected)
    weight = torch.arange(24.0, dtype=torch.float64).view(4, 6)
    grads = [torch.autograd.grad((out * weight).sum(), q)[0] for out in (found, expected)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(attention(q, k, scale=2.0), torch.softmax(q @ k.T * 2.0, -1))


@dataclass
class Pair:
    first: Tensor
    rest: dict[str, Tensor]


torch.utils._pytree.register_dataclass(Pair)


class Nested(nn.Module):
    """Structures in and out, with leaves that are no tensors."""

    def forward(
        self, batch: dict[str, Tensor], pair: Pair, flag: bool, *, names: tuple[str, ...] = ()
    ) -> dict[str, object]:
        total = batch["x"] * 2 + pair.first
        return {
            "total": total if flag else -total,
            "pair": Pair(pair.rest["y"] + 1, {"z": total.sum()}),
            "names": names,
            "none": None,
        }


def test_structures_in_and_out() -> None:
    model = shard(Nested(), mesh=MESH)
    x = inputs()
    for flag in (True, False):
        found = model({"x": x}, Pair(x + 1, {"y": x - 1}), flag, names=("a", "b"))
        expected = Nested()({"x": x}, Pair(x + 1, {"y": x - 1}), flag, names=("a", "b"))
        assert isinstance(found["pair"], Pair) and found["names"] == ("a", "b") and found["none"] is None
        torch.testing.assert_close(found["total"], expected["total"])
        torch.testing.assert_close(found["pair"].first, expected["pair"].first)
        torch.testing.assert_close(found["pair"].rest["z"], expected["pair"].rest["z"])


class Dropping(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.dropout(self.up(x), 0.5, self.training))


def test_training_and_inference_alternate() -> None:
    single, model = pair(Dropping)
    x = inputs()
    for training in (True, False, True):
        single.train(training)
        model.train(training)
        torch.manual_seed(5)
        one = single(x)
        torch.manual_seed(5)
        torch.testing.assert_close(model(x), one)
        with torch.no_grad():
            torch.manual_seed(6)
            one = single(x)
            torch.manual_seed(6)
            other = model(x)
        torch.testing.assert_close(other, one)
        assert not other.requires_grad
    with torch.inference_mode():
        model.eval()
        torch.testing.assert_close(model(x), single.eval()(x))


def test_new_shapes_compile_again_and_old_ones_do_not() -> None:
    single, model = pair()
    check(single, model, inputs(4, 8))
    first = model.plan
    check(single, model, inputs(6, 8))
    assert model.plan is not first
    check(single, model, inputs(2, 3, 8))
    check(single, model, inputs(4, 8))
    assert model.plan is first


def test_deepcopy_and_pickle() -> None:
    single, model = pair()
    check(single, model, inputs())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(Decorated()))):
        assert isinstance(twin, MLP)
        twin.double().load_state_dict(single.state_dict())
        check(single, twin, inputs())
        assert str(twin.plan.mesh) == MESH


def test_pickle_of_a_sharded_instance() -> None:
    single, model = pair()
    check(single, model, inputs())
    check(single, pickle.loads(pickle.dumps(model)), inputs())


def test_torch_save_of_the_state() -> None:
    _, model = pair()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = MLP().double()
    other.load_state_dict(torch.load(file))
    check(other, model, inputs())


def test_parameter_names_that_start_with_digits() -> None:
    single, model = pair(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
    check(single, model, inputs())
    compile(model.code, "generated", "exec")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(i)))


def test_tied_weights() -> None:
    single, model = pair(Tied)
    assert model.head.weight is model.embed.weight
    check(single, model, torch.arange(8).view(2, 4))


def test_constraint_on_the_other_name_of_a_tied_weight() -> None:
    model = Tied()
    i = torch.arange(8).view(2, 4)
    compiled = shardc.compile(model, MESH, (i,), constraints={"embed.weight": ("tp", None)})
    assert layout_of(compiled, "embed.weight") == "[16@tp, 8]"
    torch.testing.assert_close(compiled(i), model(i))


class Counting(nn.Module):
    """A buffer that is read, one that changes, and a parameter that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.norm(x @ self.frozen + self.shift)


def test_buffers_and_frozen_parameters() -> None:
    single, model = pair(Counting)
    for _ in range(3):
        check(single, model, inputs())
    assert int(model.steps) == 3
    torch.testing.assert_close(model.norm.running_mean, single.norm.running_mean)
    model.frozen.requires_grad_()
    single.frozen.requires_grad_()
    check(single, model, inputs())
    assert model.frozen.grad is not None


def test_inputs_that_require_gradients() -> None:
    single, model = pair()
    found: list[Tensor] = []
    for part in (single, model):
        x = inputs().requires_grad_()
        part(x).square().sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_sharded_model_inside_a_larger_program() -> None:
    single, model = pair()
    head = nn.Linear(8, 1).double()
    check(nn.Sequential(single, head), nn.Sequential(model, copy.deepcopy(head)), inputs())


def test_sharded_outputs_stay_split() -> None:
    single, _ = pair()
    x = inputs(8, 8)
    compiled = shardc.compile(single, "dp=4", (x,), outputs="sharded", constraints={"down": ("dp", None)})
    slot = next(s for s in compiled.executable.outputs if s.role == "output")
    assert slot.cuts == ((0, 1, "dp"),)
    torch.testing.assert_close(compiled(x), single(x))


def layout_of(compiled: shardc.api.Compiled, name: str) -> str:
    return str(next(placed for placed in compiled.plan.placed if placed.name == name).layout)


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
    assert "test_api.py:" in compiled.graph("capture")
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


def test_sharding_again_replaces_the_request() -> None:
    single, model = pair()
    check(single, model, inputs())
    model = shard(model, mesh="x=4")
    check(single, model, inputs())
    assert str(model.plan.mesh) == "x=4"


def test_plain_decorator_uses_the_whole_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    model = shard(MLP())
    monkeypatch.undo()
    model(torch.zeros(4, 8))
    assert str(model.plan.mesh) == "dp=4"


def test_optimizer_made_before_sharding_keeps_its_parameters() -> None:
    single = MLP().double()
    model = copy.deepcopy(single)
    optimizers = [torch.optim.AdamW(part.parameters(), 1e-2) for part in (single, model)]
    model = shard(model, mesh=MESH)
    for _ in range(3):
        check(single, model, inputs())
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(single.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
