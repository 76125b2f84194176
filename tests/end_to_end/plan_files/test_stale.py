"""A file of a plan that is not for this call is refused with what changed; the cache plans again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc.api import Compiled
from shardc.cost.hardware import hardware
from shardc.errors import ShardcError
from shardc.passes import assign

X = torch.ones(4, 8)


class Layer(nn.Module):
    def __init__(self, width: int = 16, slope: float = 0.1, then: Callable[[Tensor], Tensor] = torch.clone) -> None:
        super().__init__()
        self.up, self.slope, self.then = nn.Linear(8, width, bias=False), slope, then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(nn.functional.leaky_relu(self.up(x), self.slope))[:, :8]


def stack(depth: int = 3, **asked: Any) -> nn.Module:
    return nn.Sequential(*(Layer(**asked) for _ in range(depth)))


def compiled(model: nn.Module, mesh: str = "dp=2", x: Tensor = X, **options: Any) -> Compiled:
    return shardc.compile(model, mesh, (x,), **options)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stale") / "plan.json"
    compiled(stack(), memory="unbounded", hardware="h100").plan.save(path)
    return path


def test_what_changed_is_told(plan: Path) -> None:
    changed: dict[str, tuple[Callable[[], object], str]] = {
        "mesh": (lambda: compiled(stack(), "dp=4", plan=plan), "the mesh is dp=4, and was dp=2"),
        "option": (lambda: compiled(stack(), outputs="full", plan=plan), "outputs is 'full', and was 'auto'"),
        "hardware": (lambda: compiled(stack(), hardware="a100", plan=plan), "hardware is 'a100', and was 'h100'"),
        "width": (lambda: compiled(stack(width=32), plan=plan), "*.up.weight is f32[32, 8] x3, and was f32[16, 8] x3"),
        "depth": (lambda: compiled(stack(4), plan=plan), "*.up.weight is f32[16, 8] x4, and was f32[16, 8] x3"),
        "input": (lambda: compiled(stack(), x=torch.ones(6, 8), plan=plan), "input:0 is f32[6, 8], and was f32[4, 8]"),
        "dtype": (
            lambda: compiled(stack().double(), x=X.double(), plan=plan),
            "input:0 is f64[4, 8], and was f32[4, 8]",
        ),
        "argument": (lambda: compiled(stack(slope=0.2), plan=plan), "leaky_relu has other arguments"),
        "operators": (lambda: compiled(stack(then=torch.relu), plan=plan), "* relu is new"),
        "gradients": (lambda: torch.no_grad()(compiled)(stack(), plan=plan), "makes no gradients of parameters"),
    }
    for name, (call, told) in changed.items():
        with pytest.raises(ShardcError, match=re.escape(told)) as raised:
            call()
        assert f"{plan} is not a plan for this call" in str(raised.value), name
        assert "plan again, without plan=" in str(raised.value), name


def test_hardware_of_one_name_is_compared_by_its_figures(plan: Path) -> None:
    data = json.loads(plan.read_text())
    assert data["hardware"]["launch"] == hardware("h100").launch
    data["hardware"]["inside"]["latency"] = 1.0
    with pytest.raises(ShardcError, match=r"hardware inside\.latency is 1\.9e-06, and was 1\.0"):
        compiled(stack(), plan=written(data, plan))


@pytest.mark.parametrize(("change", "told"), [
    ({"shardc": "0.0.1"}, "and was 0.0.1"),
    ({"version": 0}, "has version 0 of the format; this is 1"),
    ({"parameters": ["f32[8]"]}, "parameters is not a table of texts"),
    ({"operators": {"relu": 3}}, "operators['relu'] is not a text or null"),
    ({"mesh": {}}, "mesh is not a table of axes"),
    ({"proof": {}}, "proof.cost is not a number"),
])  # fmt: skip
def test_files_that_are_no_plans_are_told(plan: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ShardcError, match=re.escape(told)):
        compiled(stack(), plan=written({**json.loads(plan.read_text()), **change}, plan))


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(ShardcError, match="cannot read the plan"):
        compiled(stack(), plan=path)
    for text, told in (("{", "is not JSON"), ("[]", "is no plan of shardc")):
        path.write_text(text)
        with pytest.raises(ShardcError, match=told):
            compiled(stack(), plan=path)


def written(data: dict[str, Any], beside: Path) -> Path:
    path = beside.with_name("changed.json")
    path.write_text(json.dumps(data))
    return path


def test_a_sharded_model_takes_mesh_and_options_from_the_file(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is for the program that trains; one that only evaluates, and one of another batch, are solved."""
    model = shardc.shard(stack(), plan=plan)
    with torch.no_grad():
        model(X)
    solve = assign.solve
    monkeypatch.setattr(assign, "solve", None)
    model(X).sum().backward()
    assert str(model.plan).startswith("plan for mesh dp=2 on h100")
    monkeypatch.setattr(assign, "solve", solve)
    model(X.double().float()[:2].requires_grad_())


class Cached:
    """A folder of plans, and how often the solver ran."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from shardc.explain.plan_file import cache

        self.folder, self.solved, solve = folder, 0, assign.solve

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.solved += 1
            return solve(*args, **kwargs)

        monkeypatch.setenv("SHARDC_PLAN_CACHE", str(folder))
        monkeypatch.setattr(cache, "WORTH", 0.0)
        monkeypatch.setattr(assign, "solve", counted)

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*"))

    def solves(self, *args: Any, **options: Any) -> bool:
        before = self.solved
        self.program = compiled(*args, **options)
        return self.solved > before


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cached:
    return Cached(tmp_path / "plans", monkeypatch)


def test_a_plan_is_found_once(cached: Cached) -> None:
    assert cached.solves(stack())
    code = cached.program.code
    assert not cached.solves(stack()) and cached.program.code == code and len(cached.files()) == 1
    for change in ({"mesh": "dp=4"}, {"outputs": "full"}, {"x": torch.ones(8, 8)}):
        assert cached.solves(stack(), **change), change
    assert len(cached.files()) == 4
    assert cached.solves(stack(), cache=False) and len(cached.files()) == 4


def test_a_damaged_file_is_planned_again(cached: Cached) -> None:
    cached.solves(stack(1))
    (file,) = cached.files()
    text = file.read_text()
    for damaged in (
        "",
        "{}",
        text[: len(text) // 2],
        text.replace("f32[", "f33["),
        text.replace(' mm": "', ' mm": "m@xx, '),
    ):
        file.write_text(damaged)
        assert cached.solves(stack(1))
        assert cached.files() == [file] and not cached.solves(stack(1))


def test_a_folder_that_cannot_be_written_is_no_error(cached: Cached) -> None:
    cached.folder.write_text("a file")
    assert cached.solves(stack(1)) and cached.solves(stack(1))


def test_threads_of_the_process_do_not_count(tmp_path: Path) -> None:
    heads = (torch.ones(1, 2, 8, 4), torch.ones(1, 2, 8, 4), torch.ones(1, 2, 8, 4))

    class Attends(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v)

    threads, path = torch.get_num_threads(), tmp_path / "plan.json"
    shardc.compile(Attends(), "dp=2", heads).plan.save(path)
    try:
        torch.set_num_threads(threads + 1)  # as torchrun gives each process another number; kernels allocate by thread
        loaded = shardc.compile(Attends(), "dp=2", heads, plan=path).plan
    finally:
        torch.set_num_threads(threads)
    assert loaded.mesh.size == 2
