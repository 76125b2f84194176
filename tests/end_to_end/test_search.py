"""Mesh search: every mesh that can differ is planned once, and its price is that of compiling for it."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from samples.textbook import without_overlap
from shardc.cli import main
from shardc.cost.hardware import hardware
from shardc.decided import Decided, decided_alone
from shardc.ir.mesh import Mesh
from shardc.planning.compilation import Compilation
from shardc.search import ways
from shardc.search.meshes import factorisations, meshes

ROOT = Path(__file__).parents[2]


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))).square().mean()


def mlp(
    width: int, hidden: int, batch: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    with torch.device("meta"):
        return Mlp(width, hidden).to(dtype), (torch.empty(batch, width, dtype=dtype),)


@pytest.mark.parametrize(("number", "factors", "count"), [(64, 1, 1), (64, 2, 7), (64, 3, 28), (12, 2, 6), (7, 2, 2)])
def test_factorisations(number: int, factors: int, count: int) -> None:
    found = list(factorisations(number, factors))
    assert len(found) == len(set(found)) == count
    assert all(math.prod(sizes) == number and len(sizes) == factors for sizes in found)


def names(found: list[Mesh]) -> list[str]:
    return [str(mesh) for mesh in found]


def test_meshes_that_only_names_tell_apart_are_one() -> None:
    h100, axes = hardware("h100"), ("dp", "tp")
    assert names(meshes(64, axes, h100, False)) == [
        "dp=64", "dp=2,tp=32", "dp=4,tp=16", "dp=8,tp=8", "dp=16,tp=4", "dp=32,tp=2"
    ]  # fmt: skip
    assert names(meshes(8, axes, h100, False)) == ["dp=8", "dp=2,tp=4"]  # one node: order is but a name
    assert names(meshes(8, axes, replace(h100, devices_per_node=4), False)) == ["dp=8", "dp=2,tp=4", "dp=4,tp=2"]
    assert names(meshes(4, axes, h100, True)) == ["dp=1,tp=4", "dp=4,tp=1", "dp=2,tp=2"]
    assert names(meshes(1, axes, h100, False)) == ["dp=1"]
    three = names(meshes(64, ("a", "b", "c"), h100, False))
    assert len(three) == 6 + 10 - 2  # of the 10 of three axes, these are others by another name:
    assert "a=2,b=4,c=8" in three and "a=4,b=2,c=8" not in three  # both between nodes
    assert "a=8,b=2,c=4" in three and "a=8,b=4,c=2" not in three  # both inside


@pytest.mark.parametrize("sizes", [(8192, 32768, 65536), (512, 2048, 65536)])
def test_every_price_is_that_of_compiling_for_the_mesh(sizes: tuple[int, int, int]) -> None:
    model, inputs = mlp(*sizes)
    found = shardc.search_mesh(model, 16, inputs, hardware="h100", axes=("a", "b"))
    assert [one.pace for one in found.ranked] == sorted((one.pace for one in found.ranked), reverse=True)
    assert len(found.ranked) == 4
    for one in found.ranked:
        plan = shardc.compile(model, one.mesh, inputs, hardware="h100").plan
        if math.isfinite(one.cost):
            assert one.cost == pytest.approx(plan.cost) and one.gap < 1e-6
        else:
            assert one.lower_bound <= plan.cost and plan.cost >= found.ranked[0].cost
    assert found.best == found.ranked[0].mesh
    assert "4 meshes of 16 devices on h100" in str(found) and "optimal" in str(found)


def test_big_weights_and_a_big_batch_over_nodes_want_two_axes() -> None:
    """The textbook's: the batch over nodes and columns and rows inside beats either alone."""
    model, inputs = mlp(8192, 32768, 65536)
    found = shardc.search_mesh(model, 16, inputs, hardware=without_overlap("h100"), memory="unbounded")
    assert str(found.best) in ("dp=2,tp=8", "dp=4,tp=4", "dp=8,tp=2")
    worst = next(one for one in found.ranked if str(one.mesh) == "dp=16")
    assert found.ranked[0].cost < worst.cost
    for one in found.ranked[:2]:
        asked = {"hardware": without_overlap("h100"), "memory": "unbounded"}
        assert one.held == shardc.compile(model, one.mesh, inputs, **asked).plan.memory.peak


def test_a_ranking_is_kept_for_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDC_PLAN_CACHE", str(tmp_path))
    monkeypatch.setattr("shardc.search.search.WORTH", 0.0)
    model, inputs = mlp(64, 256, 32)
    first = shardc.search_mesh(model, 4, inputs, hardware="h100")
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    monkeypatch.setattr("shardc.search.ways.Ways.tried", lambda *_: pytest.fail("a mesh is planned again"))
    again = shardc.search_mesh(model, 4, inputs, hardware="h100")
    assert replace(again, shared=first.shared) == first and str(again.ranked[0]) == str(first.ranked[0])
    assert first.ranked[0].summary is not None and again.ranked[0].summary == first.ranked[0].summary
    next(tmp_path.iterdir()).write_text("{")  # what is damaged is not read
    with pytest.raises(pytest.fail.Exception, match="planned again"):
        shardc.search_mesh(model, 4, inputs, hardware="h100")


def test_three_axes_are_searched_where_three_are_named() -> None:
    model, inputs = mlp(512, 2048, 512)
    found = shardc.search_mesh(model, 8, inputs, hardware="h100", axes=("a", "b", "c"))
    assert {str(one.mesh) for one in found.ranked} == {"a=8", "a=2,b=4", "a=2,b=2,c=2"}
    cost = {str(one.mesh): one.cost for one in found.ranked}
    assert found.ranked[0].cost == min(cost.values())


def test_what_does_not_fit_is_said() -> None:
    model, inputs = mlp(4096, 16384, 64)
    small = replace(hardware("h100"), memory=1e6)
    assert "more than the 976.6 KiB of a device" in str(
        shardc.search_mesh(model, 2, inputs, hardware=small, memory="unbounded")
    )
    with pytest.raises(shardc.ShardcError, match=r"no mesh of 2 devices .*they alone take \d+ devices or"):
        shardc.search_mesh(model, 2, inputs, hardware=small)


def test_within_a_bound_on_memory_every_plan_fits() -> None:
    """The same prices as compiling for each mesh within the bound; the free plan needs more."""
    model, inputs = mlp(1024, 4096, 8192)
    free = shardc.search_mesh(model, 4, inputs, hardware="h100", optimizer="adamw", memory="80GB")
    bound = 0.85 * free.ranked[0].held
    found = shardc.search_mesh(model, 4, inputs, hardware="h100", optimizer="adamw", memory=bound)
    assert found.ranked[0].cost >= free.ranked[0].cost and "held" in str(found)
    for one in found.ranked:
        if math.isfinite(one.cost):
            plan = shardc.compile(model, one.mesh, inputs, hardware="h100", optimizer="adamw", memory=bound).plan
            assert plan.memory is not None and plan.memory.peak <= bound
            assert one.cost == pytest.approx(plan.cost) and one.held == plan.memory.peak
    with pytest.raises(shardc.ShardcError, match=r"no mesh of 4 devices .*they alone take \d+ devices or"):
        shardc.search_mesh(model, 4, inputs, hardware="h100", optimizer="adamw", memory="1MB")


def test_the_best_is_the_plan_that_compile_makes_of_it_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits in one or two micro-batches; in four it does, with something computed again."""
    made: dict[tuple[str, int, int], str] = {}

    def noted(c: Compilation, before: dict[str, Compilation]) -> Decided:
        found = decided_alone(c, before)
        made[str(c.mesh), c.program.turns, found.plan.summary.rows] = found.snapshots["codegen"].code()
        return found

    monkeypatch.setattr(ways, "decided_alone", noted)
    model, inputs = mlp(1024, 4096, 65536, torch.float32)
    asked: dict[str, Any] = {"hardware": "h100", "memory": "300MB", "cache": False}
    found = shardc.search_mesh(model, 4, inputs, **asked, batch="32768:65536", axes=("dp",))
    best = found.ranked[0]
    assert found.microbatches > 1 and any("does not fit" in one.remark for one in found.ranked)
    assert "micro-batches" in str(found) and "batch" in str(found)
    with torch.device("meta"):
        x = torch.empty(found.batch, 1024)
    again = shardc.compile(model, found.best, (x,), microbatches=found.microbatches, **asked)
    assert again.plan.turns * again.plan.cost == best.cost and again.plan.memory.peak == best.held
    assert again.plan.summary == best.summary and again.plan.predicted == pytest.approx(best.seconds)
    assert again.code == made[str(found.best), found.microbatches, found.batch]
    with pytest.raises(shardc.ShardcError, match=r"no mesh of 4 devices has a plan; .*rounds a sum over all samples"):
        shardc.search_mesh(*mlp(1024, 4096, 65536)[:1], 4, mlp(1024, 4096, 65536)[1], **asked, axes=("dp",))


def test_a_batch_is_doubled_while_that_pays() -> None:
    model, inputs = mlp(256, 1024, 64)
    found = shardc.search_mesh(model, 2, inputs, hardware="h100", batch="auto")
    sizes = sorted({one.batch for one in found.ranked})
    assert sizes == [64 * 2**power for power in range(len(sizes))] and found.batch == sizes[-2]
    best = {size: max(one.pace for one in found.ranked if one.batch == size) for size in sizes}
    gains = [best[2 * size] / best[size] - 1.0 for size in sizes[:-1]]
    assert min(gains[:-1]) >= 0.02 > gains[-1]
    assert f"larger batches than {sizes[-1]}" in str(found)
    named = shardc.search_mesh(model, 2, inputs, hardware="h100", batch=128)
    assert {one.batch for one in named.ranked} == {128}
    for wrong in ("8:4", "many", 0):
        with pytest.raises(shardc.ShardcError, match="is no batch: write a number of rows, a range"):
            shardc.search_mesh(model, 2, inputs, batch=wrong)


class KnowsItsBatch(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.new_zeros(64, 1))


def test_a_batch_that_the_model_cannot_take_ends_the_search_with_what_was_found() -> None:
    _, inputs = mlp(64, 128, 64)
    with torch.device("meta"):
        model = KnowsItsBatch(64, 128).bfloat16()
    found = shardc.search_mesh(model, 2, inputs, hardware="h100", batch="auto", cache=False)
    assert found.batch == 64 and "larger batches than 64: with batch=128 in dim 0 of every input" in str(found)
    with pytest.raises(shardc.ShardcError, match=r"with batch=32 in dim 0 of every input that has as many rows"):
        shardc.search_mesh(model, 2, inputs, hardware="h100", batch=32)


def test_another_optimizer_is_taken_only_if_allowed_and_only_where_memory_binds() -> None:
    model, inputs = mlp(1024, 4096, 64)
    stored = 2 * 1024 * 4096 * 2
    asked: dict[str, Any] = {"hardware": "h100", "optimizer": "adamw", "cache": False}
    tight = asked | {"memory": 2.7 * stored / 2}
    with pytest.raises(shardc.ShardcError, match=r"they alone take \d+ devices"):
        shardc.search_mesh(model, 2, inputs, **tight)
    found = shardc.search_mesh(model, 2, inputs, **tight, optimizers=("sgd",))
    assert found.optimizer == "sgd" and "does not fit, however it is split" in str(found)
    small = asked | {"memory": 2.7 * stored / 2, "optimizer": "sgd"}
    kept = shardc.search_mesh(model, 2, inputs, **small, optimizers=("adamw",))
    assert kept.optimizer == "" and "does not fit, however it is split" in str(kept)
    wide = shardc.search_mesh(model, 2, inputs, **asked, optimizers=("sgd",))
    assert wide.optimizer == "" and "sgd in place of the optimizer: memory does not bind" in str(wide)


def test_constraints_keep_the_names_of_axes() -> None:
    model, inputs = mlp(256, 1024, 64)
    wanted = {"up.weight": ("tp", None)}
    found = shardc.search_mesh(model, 8, inputs, hardware="h100", constraints=wanted)
    assert {str(one.mesh) for one in found.ranked} == {"dp=1,tp=8", "dp=8,tp=1", "dp=2,tp=4", "dp=4,tp=2"}
    for one in found.ranked:
        if math.isfinite(one.cost):
            plan = shardc.compile(model, one.mesh, inputs, hardware="h100", constraints=wanted).plan
            assert one.cost == pytest.approx(plan.cost)


def test_what_cannot_be_searched_is_an_error() -> None:
    model, inputs = mlp(8, 8, 8)
    with pytest.raises(shardc.ShardcError, match="cannot spread 0 devices over 2 axes"):
        shardc.search_mesh(model, 0, inputs)
    with pytest.raises(shardc.ShardcError, match=r"no mesh of 4 devices has a plan; .*: .*tq"):
        shardc.search_mesh(model, 4, inputs, constraints={"up.weight": ("tq", None)})


def test_the_command_line_ranks_meshes_and_gives_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    asked = ["plan", "examples/mlp.py", "--hardware", "h100", "--outputs", "sharded", "--constraint", "up.weight=tp,-"]
    assert main([*asked, "--devices", "4"]) == 0
    out = capsys.readouterr().out
    assert "3 meshes of 4 devices on h100, the fastest plan first" in out
    command = shlex.split(out.splitlines()[-1])
    assert command[:3] == ["shardc", "plan", "examples/mlp.py"] and "--constraint=up.weight=tp,-" in command
    assert main([*asked, "--devices", "4", "--memory", "80GB", "--optimizer", "adamw"]) == 0
    out = capsys.readouterr().out
    assert "held: the most at any time" in out
    kept = "--constraint=up.weight=tp,- --hardware=h100 --outputs=sharded --memory=80GB --optimizer=adamw"
    best = out.splitlines()[3].split()[0]
    assert out.splitlines()[-1] == f"shardc plan examples/mlp.py --mesh={best} {kept}"
    assert main(command[1:]) == 0
    assert "plan for mesh dp=" in capsys.readouterr().out
