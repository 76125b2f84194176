"""Memory by default: a plan for named hardware fits it, with the optimizer's state of what trains."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from shardc.cli import main
from shardc.cost.hardware import Hardware, hardware
from shardc.cost.memory import HEADROOM
from shardc.errors import InfeasibleError
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import ModelCall
from shardc.options import Options
from shardc.passes import assign as assigning
from shardc.passes.assign import TooSlowError
from shardc.passes.pipeline import part, run
from shardc.planning.compilation import Compilation
from shardc.planning.recompute_network import RecomputeNetwork

MESH = "dp=2,tp=2"
H100 = hardware("h100")


def tower(rows: int = 2**21) -> tuple[nn.Sequential, tuple[Tensor, ...]]:
    """Two blocks, 1024 wide, of which activations take most by far."""
    with torch.device("meta"):
        blocks = (nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)) for _ in range(2))
        return nn.Sequential(*blocks), (torch.empty(rows, 1024),)


def planned(
    device: str | Path | Hardware | None = "h100", mesh: str = MESH, rows: int = 2**21, **options: Any
) -> shardc.Plan:
    model, inputs = tower(rows)
    return shardc.compile(model, mesh, inputs, hardware=device, **options).plan


def small(part: float) -> Hardware:
    """An H100 whose memory, less the headroom, is a part of what the fastest plan holds with the state of adamw."""
    peak = planned(memory="unbounded", optimizer="adamw").memory.peak
    return replace(H100, memory=part * peak / (1.0 - HEADROOM))


def test_named_hardware_bounds_and_adamw_counts() -> None:
    plan, free = planned(), planned(memory="unbounded")
    assert plan.memory.budget == (1.0 - HEADROOM) * 80e9 and free.memory.budget is None
    assert plan.memory.parts["optimizer state"] == 2 * plan.memory.parts["parameters"]
    assert "optimizer state" not in free.memory.parts
    assert plan.cost == free.cost and plan.lower_bound == free.lower_bound


def test_this_machine_and_hardware_of_no_known_memory_do_not_bound() -> None:
    for device in (None, replace(H100, memory=float("inf"))):
        assert planned(device).memory.budget is None
        assert "optimizer state" not in planned(device).memory.parts


def test_what_was_asked_for_stands() -> None:
    assert planned(memory="60GB").memory.budget == 60e9
    assert "optimizer state" not in planned(memory="60GB").memory.parts
    plan = planned(optimizer="lion")
    assert plan.memory.parts["optimizer state"] == plan.memory.parts["parameters"]
    assert plan.memory.budget == (1.0 - HEADROOM) * 80e9
    assert "optimizer state" in planned(None, optimizer="adamw").memory.parts


def test_only_what_trains_has_state() -> None:
    model, inputs = tower()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    plan = shardc.compile(model, "dp=2", inputs, hardware="h100").plan
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert plan.memory.parts["optimizer state"] == 2 * (plan.memory.parts["parameters"] - frozen)
    with torch.no_grad():
        assert "optimizer state" not in shardc.compile(model, "dp=2", inputs, hardware="h100").plan.memory.parts


def test_where_the_fastest_plan_fits_nothing_is_solved_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    solves: list[object] = []
    real = assigning.solved  # type: ignore[attr-defined]
    monkeypatch.setattr(assigning, "solved", lambda *args, **more: solves.append(args) or real(*args, **more))
    monkeypatch.setattr(RecomputeNetwork, "build", lambda self: pytest.fail("a network with memory was built"))
    planned()
    assert len(solves) == 1


@pytest.mark.parametrize("part", [0.9, 0.85])
def test_where_it_does_not_fit_a_plan_is_found_that_does(part: float) -> None:
    device = small(part)
    plan, free = planned(device), planned(device, memory="unbounded")
    assert plan.memory.peak <= plan.memory.budget == (1.0 - HEADROOM) * device.memory
    assert plan.cost > free.cost
    asked = planned("h100", memory=(1.0 - HEADROOM) * device.memory, optimizer="adamw")
    assert plan.cost == pytest.approx(asked.cost, rel=1e-3)
    assert plan.lower_bound * (1 - 1e-6) <= plan.check() <= plan.cost * (1 + 1e-9)


def test_a_mesh_that_cannot_beat_the_best_is_not_solved_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Compilation(ModelCall.of(*tower()), Mesh.parse(MESH), Options(hardware=small(0.9)))
    monkeypatch.setattr(RecomputeNetwork, "build", lambda self: pytest.fail("a network with memory was built"))
    with pytest.raises(TooSlowError, match="no plan takes less than"):
        run(part("capture", "assign"), replace(start, too_slow=1e-9))


def message(function: Callable[[], object]) -> str:
    with pytest.raises(InfeasibleError) as error:
        function()
    return str(error.value)


def test_out_of_memory_says_what_is_missing_and_what_would_do() -> None:
    device = replace(H100, memory=6e9)
    told = message(lambda: planned(device))
    assert re.match(r"no plan was found for dp=2,tp=2 that holds at most 5.0 GiB a device \(the memory of the h", told)
    assert re.search(r"smallest peak found is [\d.]+ GiB, in \w+ \(.+\): activations [\d.]+ GiB", told)
    assert "parameters, gradients and optimizer state are" in told and "memory='unbounded'" in told


def test_more_devices_would_do_and_so_would_a_smaller_batch() -> None:
    """What the error says is tried."""
    told = message(lambda: planned(mesh="dp=4", rows=2**24))
    (devices,) = map(int, re.findall(r"more devices would do, about (\d+)", told))
    (rows,) = map(int, re.findall(r"about (\d+) in place of 16777216 in dim 0", told))
    assert devices > 4 and planned(mesh=f"dp={devices}", rows=2**24).memory.peak <= 72e9
    assert rows < 2**24 and planned(mesh="dp=4", rows=rows).memory.peak <= 72e9


def test_what_cannot_lie_on_so_few_devices_names_their_number_and_a_leaner_optimizer() -> None:
    with torch.device("meta"):
        model, inputs = nn.Linear(4096, 4096, bias=False), (torch.empty(8, 4096),)
    device = replace(H100, memory=1.2e8)  # parameters, gradients and state are 4 x 64 MiB
    told = message(lambda: shardc.compile(model, "dp=2", inputs, hardware=device))
    assert "256.0 MiB in all, 128.0 MiB a device if all is split: they alone take 3 devices or more" in told
    assert "optimizer='sgd' holds no state, optimizer='adamw' does: that saves 64.0 MiB, and is enough" in told
    assert shardc.compile(model, "dp=2", inputs, hardware=device, optimizer="sgd").plan.memory.peak <= 1.08e8
    assert shardc.compile(model, "dp=3", inputs, hardware=device).plan.memory.peak <= 1.08e8


def test_outputs_that_are_gathered_for_nobody() -> None:
    with torch.device("meta"), torch.no_grad():
        model, inputs = nn.Linear(64, 4096, bias=False), (torch.empty(8192, 64),)
        device = replace(H100, memory=1.2e8)
        told = message(lambda: shardc.compile(model, "dp=2", inputs, hardware=device, outputs="full"))
        assert "outputs='sharded' gathers none of the outputs, which hold 128.0 MiB" in told
        assert shardc.compile(model, "dp=2", inputs, hardware=device).plan.memory.peak <= 1.08e8


def test_api_search_and_command_line_agree_to_the_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = tmp_path / "small.toml"
    source = (Path(shardc.__file__).parent / "cost/hardware/h100.toml").read_text()
    device.write_text(source.replace("memory = 80e9", f"memory = {small(0.9).memory!r}"))
    model, inputs = tower()
    found = shardc.search_mesh(model, 4, inputs, hardware=device)
    for one in found.ranked:
        if math.isfinite(one.cost):
            plan = shardc.compile(model, one.mesh, inputs, hardware=device).plan
            assert one.held == plan.memory.peak and one.cost == plan.cost
    file = tmp_path / "tower.py"
    file.write_text(
        "from end_to_end.options.test_memory_by_default import tower\n"
        "def model():\n    return tower()[0]\n"
        "def inputs():\n    return tower()[1]\n"
    )
    plan = shardc.compile(model, MESH, inputs, hardware=device).plan
    assert main(["plan", str(file), "--mesh", MESH, "--hardware", str(device)]) == 0
    assert plan.memory.summary in capsys.readouterr().out
    assert main(["plan", str(file), "--mesh", MESH, "--hardware", str(device), "--memory", "unbounded"]) == 0
    assert planned(str(device), memory="unbounded").memory.summary in capsys.readouterr().out
    assert main(["explain", str(file), "--mesh", MESH, "--hardware", str(device), "--why", "0.0.weight"]) == 0
    assert str(plan.why("0.0.weight").runner_up.summary) in capsys.readouterr().out  # type: ignore[union-attr]


def test_a_memory_reads_as_text() -> None:
    memory = planned().memory
    first, *parts, counted = str(memory).splitlines()
    assert re.match(r"a device holds [\d.]+ GiB of 67.1 GiB at most, in backward \(", first)
    assert [re.split(r"  +", line.strip())[0] for line in parts] == [label for label, _ in memory.largest]
    assert sum(memory.parts.values()) == memory.peak
    assert counted.strip() == f"state of {memory.optimizer}" and memory.optimizer.startswith("adamw: exp_avg and ")
