"""What a user can get wrong: every message says what, where, and the way out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shardc
from checks.preloaded import ran
from shardc import Mesh, constrain, shard
from shardc.errors import (
    CaptureError,
    ConstraintError,
    InfeasibleError,
    LayoutError,
    MeshError,
    RuleError,
    ShardcError,
)
from shardc.runtime import RankError


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


X = (torch.zeros(4, 8),)


def compile_mlp(mesh: str = "dp=2,tp=2", **options: object) -> shardc.api.Compiled:
    return shardc.compile(MLP(), mesh, X, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "constraints", "message"),
    [
        (LayoutError, {"up.weight": ("pp", None)}, "on up.weight: mesh dp=2,tp=2 has no axis 'pp'; it has dp, tp"),
        (LayoutError, {"up.weight": ("tp", "tp")}, "on up.weight: axis 'tp' splits dim 0 and dim 1; it can split one"),
        (LayoutError, {"up.weight": ("tp", None, None)}, "3 entries for a tensor of shape (16, 8); give one per dim"),
        (LayoutError, {"up.bias": ("tp", "dp")}, "2 entries for a tensor of shape (16,); give one per dim"),
        (
            ConstraintError,
            {"upp.weight": ("tp", None)},
            "'upp.weight' matches no parameter and no module; nearest: up.weight",
        ),
        (LayoutError, {"up": ("dp", None, "tp")}, "the spec (dp,-,tp) has 3 entries but the tensor has 2 dims"),
        (LayoutError, {"up": ("dp", "dp")}, "uses axis 'dp' twice"),
        (LayoutError, {"up": ("dp", "pp")}, "has no axis 'pp'; it has dp, tp"),
        (LayoutError, {"up.weight": ("t p", None)}, "'t p' is no axis name"),
        (ConstraintError, {"up.weight": (1, None)}, "constraints['up.weight']: cannot read (1, None)"),
    ],
)
def test_constraint_that_cannot_be(kind: type[ShardcError], constraints: dict[str, object], message: str) -> None:
    with pytest.raises(kind) as caught:
        compile_mlp(constraints=constraints)
    assert message in str(caught.value)


def test_constraint_in_code_names_the_line() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return constrain(x * 2, ("pp", None))

    with pytest.raises(LayoutError, match=r"test_bad_input.py:\d+: mesh dp=2 has no axis 'pp'; it has dp"):
        shardc.compile(Model(), "dp=2", X)


def test_constraint_in_code_with_too_many_entries_names_the_line() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return constrain(x * 2, ("dp", None, None))

    with pytest.raises(ShardcError, match=r"the spec \(dp,-,-\) has 3 entries but the tensor has 2 dims"):
        shardc.compile(Model(), "dp=2", X)


def test_a_constraint_on_a_dim_of_fewer_elements_than_ranks() -> None:
    with pytest.raises(
        InfeasibleError, match=r"on up.weight: dim 0 has 16 elements, fewer than the 17 ranks of tp; choose another dim"
    ):
        compile_mlp("tp=17", constraints={"up.weight": ("tp", None)})


def test_more_ranks_than_elements_in_the_code_names_the_line() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return constrain(x * 2, ("dp", None))

    with pytest.raises(
        InfeasibleError, match=r"test_bad_input.py:\d+: dim 0 has 4 elements, fewer than the 5 ranks of dp"
    ):
        shardc.compile(Model(), "dp=5", X)


def test_infeasible_constraints_name_a_minimal_set() -> None:
    constraints = {"down.*eight": (None, "tp"), "up.weight": ("tp", None), "up.bias": ("tp",), "up.*t": ("dp", None)}
    with pytest.raises(InfeasibleError) as caught:
        compile_mlp(constraints=constraints)
    text = str(caught.value)
    assert "contradict each other" in text
    assert "constraints['up.weight'] on up.weight" in text and "constraints['up.*t'] on up.weight" in text
    assert "bias" not in text and "down" not in text


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tp", "cannot read 'tp' in mesh 'tp'; write axes like 'dp=2,tp=4'"),
        ("tp=two", "cannot read 'tp=two'"),
        ("tp=-2", "cannot read 'tp=-2'"),
        ("tp=0", "mesh axis 'tp' has size 0; sizes are 1 or more"),
        ("tp=2,tp=2", "names an axis twice"),
        ("2d=2", "mesh axis '2d' is not a name"),
        ("", "cannot read '' in mesh ''"),
    ],
)
def test_unreadable_mesh(mesh: str, message: str) -> None:
    with pytest.raises(MeshError) as caught:
        compile_mlp(mesh)
    assert message in str(caught.value)


def test_no_mesh_and_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(MeshError, match="no mesh was named"):
        shard(MLP())


@pytest.mark.parametrize(("world", "relation"), [("2", "larger than"), ("8", "smaller than")])
def test_world_of_another_size(world: str, relation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", world)
    expected = (
        f"mesh dp=2,tp=2 has 4 devices, {relation} the {world} processes of this run; "
        "start torchrun with --nproc-per-node 4"
    )
    with pytest.raises(MeshError, match=expected):
        compile_mlp()


@pytest.mark.distributed
def test_mesh_larger_than_the_world_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "large.py"
    script.write_text(
        "import os\nimport torch\nfrom torch import nn\nfrom shardc import shard\n"
        "try:\n    shard(nn.Linear(4, 4), mesh='tp=4')(torch.zeros(4, 4))\n"
        "except Exception as error:\n"
        f"    open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write(f'{{type(error).__name__}} {{error}}')\n"
    )
    done = ran("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    assert done.returncode == 0, done.stderr
    for rank in "01":
        said = (tmp_path / rank).read_text()
        assert "MeshError mesh tp=4 has 4 devices, larger than the 2 processes of this run" in said


@torch.library.custom_op("shardc_tests::unknown", mutates_args=())
def unknown(x: Tensor) -> Tensor:
    return torch.rand_like(x)


@unknown.register_fake
def _unknown_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return unknown(x)


def test_operator_without_a_rule_names_operator_module_and_line() -> None:
    with pytest.raises(RuleError) as caught, torch.no_grad():
        shardc.compile(nn.Sequential(nn.Linear(8, 8), Unknown()), "dp=2", X)
    text = str(caught.value)
    assert "no rule for operator shardc_tests.unknown.default" in text
    assert "1, test_bad_input.py:" in text, text
    assert "two runs on equal operands differ" in text and "shardc.rule" in text


def test_control_flow_on_data_names_the_line() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(CaptureError) as caught:
        shardc.compile(Model(), "dp=2", X)
    assert "if x.sum() > 0:" in str(caught.value) and "test_bad_input.py" in str(caught.value)
    assert "torch.where" in str(caught.value)


def test_unknown_names_of_options() -> None:
    with pytest.raises(ShardcError, match="mode='fast' is not known; it is one of auto, propagate"):
        compile_mlp(mode="fast")
    with pytest.raises(ShardcError, match=r"no hardware called 'tpu'; write one of a100, .*cpu, h100"):
        compile_mlp(hardware="tpu")
    with pytest.raises(ShardcError, match="outputs='some' is not known; it is one of auto, full, sharded"):
        compile_mlp(outputs="some")
    with pytest.raises(ShardcError, match="no pass is called 'lower'; the passes are capture, normalize"):
        compile_mlp().graph("lower")
    with pytest.raises(ShardcError, match=r"it is no nn\.Module, no class of modules and no function"):
        shard(3, mesh="dp=2")


def test_plan_before_the_first_call() -> None:
    model = shard(MLP(), mesh="dp=2")
    for look in (lambda: model.plan, lambda: model.code, lambda: model.graph("capture")):
        with pytest.raises(ShardcError, match="nothing is compiled yet: call the model once"):
            look()


def test_a_planned_meta_model_cannot_run() -> None:
    with torch.device("meta"):
        model = MLP()
    compiled = shardc.compile(model, "dp=2", (torch.empty(4, 8, device="meta"),))
    with pytest.raises(ShardcError, match=r"up.weight is on the meta device: this model was planned but has no values"):
        compiled(torch.zeros(4, 8))


def test_a_failed_compile_leaves_the_model_as_it_was() -> None:
    model = MLP()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(vars(model))
    with pytest.raises(ShardcError):
        shardc.compile(model, "tp=17", X, constraints={"up.weight": ("tp", None)})
    assert type(model) is MLP and set(vars(model)) == attributes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(shardc.compile(model, "tp=2", X)(*X), model(*X))


def test_a_failed_call_can_be_repeated() -> None:
    class Model(MLP):
        broken = True

        def forward(self, x: Tensor) -> Tensor:
            if self.broken and x.sum() > 0:
                return x
            return super().forward(x)

    model = shard(Model(), mesh="tp=2")
    with pytest.raises(CaptureError):
        model(*X)
    model.broken = False
    assert model(*X).shape == (4, 8)


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


class WithLoss(MLP):
    def forward(self, x: Tensor) -> Output:
        logits = super().forward(x)
        return Output(logits.square().mean(), logits)


def test_backward_from_an_output_that_is_not_the_loss() -> None:
    torch.utils._pytree.register_dataclass(Output) if Output not in torch.utils._pytree.SUPPORTED_NODES else None
    single = WithLoss()
    model = shard(WithLoss(), mesh="dp=2,tp=2")
    model.load_state_dict(single.state_dict())
    x = torch.randn(4, 8)
    for part in (single, model):
        part(x).logits.sin().sum().backward()
    for one, other in zip(single.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_double_backward_is_refused() -> None:
    model = shard(MLP(), mesh="dp=2,tp=2")
    x = torch.randn(4, 8)
    (grad,) = torch.autograd.grad(model(x).sum(), [model.up.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives outside of its forward"):
        grad.sum().backward()


def test_retained_graph_gives_the_same_gradient_again_and_a_released_one_is_refused() -> None:
    model = shard(MLP(), mesh="dp=2,tp=2")
    loss = model(torch.randn(4, 8)).square().sum()
    loss.backward(retain_graph=True)
    first = model.up.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.up.weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_rank_that_raises_names_rank_and_line() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 4)

        def forward(self, i: Tensor) -> Tensor:
            return self.table(i)

    model = shard(Model(), mesh="dp=2")
    model(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(RankError, match=r"rank \d \(dp=\d\) failed at .*embedding") as caught:
        model(torch.full((4,), 99))
    assert "IndexError" in str(caught.value)
    model(torch.zeros(4, dtype=torch.int64))  # the mesh still works


def test_mesh_objects_are_checked_too() -> None:
    with pytest.raises(MeshError, match="mesh axis 'tp' has size 0"):
        Mesh((("tp", 0),))


def test_inputs_that_are_no_tuple_and_no_dict_are_refused() -> None:
    with pytest.raises(
        ShardcError, match=r"the inputs are a Tensor; give a tuple of the model's arguments, like \(x,\)"
    ):
        shardc.compile(nn.Linear(4, 4), "dp=2", torch.randn(4, 4))  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"compile\(\) lacks example_inputs: compile\(model, mesh, example_inputs, ...\)"
    ):
        shardc.compile(nn.Linear(4, 4), "dp=2")  # type: ignore[call-arg]
