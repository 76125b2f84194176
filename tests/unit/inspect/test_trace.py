"""Traces: the format, that they tell what the plan predicts, and that what is measured is what the plan has."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardc
from checks.verifying import Stack
from shardc.analysis.recorded_step import COMPUTE
from shardc.cli import main
from shardc.compiled import Compiled
from shardc.cost.hardware import hardware
from shardc.errors import ShardcError
from shardc.inspect.measured import differences, measuring, processes
from shardc.inspect.trace import Process, Slice
from shardc.ir.report import Report
from shardc.one_step import step

FILE = """
import torch

class Model(torch.nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return "made", y, y.square().mean()  # backward starts from the loss, which is not the first

def model():
    return Model(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))

def inputs():
    return (torch.ones(8, 8),)
"""
WIDE = torch.ones(32, 64)
X = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stack() -> Compiled:
    """Three layers whose gradients are reduced beside compute."""
    cpu = hardware("cpu")
    device = replace(cpu, flops={"float32": 1e6}, inside=replace(cpu.inside, overlap=1.0, stall=0.0))
    layers = {f"layers.{layer}": ("dp", None) for layer in (0, 2, 4)}
    constraints: dict[str, Any] = {"layers.0.weight": ("dp", None), "layers.2.weight": (None, "dp"), **layers}
    return shardc.compile(Stack(), "dp=2,tp=1", (X,), hardware=device, constraints=constraints)


@pytest.fixture(scope="module")
def expected(stack: Compiled) -> Process:
    return stack.timeline()


def test_the_rank_is_busy_or_waits_for_as_long_as_is_predicted(stack: Compiled, expected: Process) -> None:
    own = [one for one in expected.slices if one.track == COMPUTE]
    assert all(one.end == other.start for one, other in itertools.pairwise(own)) and own[0].start == 0.0
    assert sum(one.end - one.start for one in own) == pytest.approx(stack.plan.predicted)
    assert max(one.end for one in expected.slices) == pytest.approx(stack.plan.predicted)
    assert max(size for _, size in expected.held) == stack.plan.memory.peak
    assert stack.plan.hidden > 0.0


def test_an_axis_carries_what_the_plan_sends_one_after_another(stack: Compiled, expected: Process) -> None:
    carried = [one for one in expected.slices if one.track == "dp"]
    sent = sum(one.seconds for one in stack.plan.conversions if one.sent)
    assert len(carried) == sum(one.sent > 0 for one in stack.plan.conversions)
    assert sum(one.end - one.start for one in carried) >= 0.9 * sent  # but for what fills buckets, which the rank does
    assert all(one.end <= other.start + 1e-12 for one, other in itertools.pairwise(carried))
    assert {one.module for one in carried} >= {"layers.0"} and all(one.told["bytes"] > 0 for one in carried)
    assert all(one.told["layout"].startswith("f32[") for one in carried if "layout" in one.told)


def check_format(path: Path) -> dict[int, str]:
    """What the Trace Event Format asks of every event. Returns the names of the processes."""
    trace = json.loads(path.read_text(), parse_constant=pytest.fail)
    processes, threads, tracks = dict[int, str](), set[tuple[int, int]](), defaultdict[Any, list[Any]](list)
    for event in trace["traceEvents"]:
        assert event["ph"] in "MXC" and isinstance(event["name"], str) and event["pid"] > 0
        if event["ph"] == "M":
            if event["name"] == "process_name":
                processes[event["pid"]] = event["args"]["name"]
            elif event["name"] == "thread_name":
                threads.add((event["pid"], event["tid"]))
        elif event["ph"] == "C":
            assert event["ts"] >= 0.0 and event["args"]["bytes"] >= 0
        else:
            assert event["ts"] >= 0.0 and event["dur"] >= 0.0 and isinstance(event["args"], dict)
            assert (event["pid"], event["tid"]) in threads and event["pid"] in processes
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for slices in tracks.values():
        slices.sort()
        assert all(end <= start + 1e-3 for (_, end), (start, _) in itertools.pairwise(slices))
    return processes


def test_commands_write_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, trace, profile = tmp_path / "model.py", tmp_path / "trace.json", tmp_path / "profile.json"
    file.write_text(FILE)
    assert main(["trace", str(file), "--mesh=dp=2", "-o", str(trace)]) == 0
    assert check_format(trace) == {1: "predicted"}
    assert main(["profile", str(file), "--mesh=dp=2", "--steps=1", "-o", str(profile)]) == 0
    assert check_format(profile) == {1: "predicted", 2: "measured, rank 0", 3: "measured, rank 1"}
    said = capsys.readouterr().out
    assert "a step, measured" in said and "where they part most" in said and "difference" in said
    assert main(["profile", str(file), "--mesh=dp=2", "--steps=0", "-o", str(profile)]) == 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def repeated() -> Compiled:
    constraints = {f"layers.{layer}.up.weight": ("tp", None) for layer in range(3)}
    return shardc.compile(Repeated(), "tp=2", (WIDE,), constraints=constraints)


def test_a_measured_module_is_left_as_it_was(repeated: Compiled) -> None:
    executable, x = repeated.executable, WIDE
    forward, before = executable.module.forward, repeated(x).detach()
    with measuring(executable, repeated.code):
        during = repeated(x).detach()
    assert torch.equal(before, during) and executable.module.forward is forward and "begin" not in vars(executable.mesh)


def collectives_of(slices: tuple[Slice, ...]) -> Counter[tuple[str, ...]]:
    """Kind, axis, module and phase of all collectives; a mesh does not know which ones carry buckets."""
    sent = [one for one in slices if one.track != COMPUTE]
    return Counter((one.kind.removesuffix("_bucket"), one.track, one.module, one.told["phase"]) for one in sent)


@pytest.mark.parametrize("name", ["stack", "repeated"])
def test_a_measured_step_has_every_call_of_the_plan_at_its_layer(name: str, request: pytest.FixtureRequest) -> None:
    """`stack` has its gradients reduced beside compute, `repeated` calls a function for its layers, in loops."""
    compiled: Compiled = request.getfixturevalue(name)
    x = X if name == "stack" else WIDE
    assert name == "stack" or (" = layer(" in compiled.code and " = layer_backward(" in compiled.code)
    assert ".start(" in compiled.code
    with measuring(compiled.executable, compiled.code) as measured:
        step(compiled, (x,))
        measured.clear()
        step(compiled, (x,))
    predicted = compiled.timeline().slices
    planned = collectives_of(predicted)
    assert sum(planned.values()) == sum(one.sent > 0 for one in compiled.plan.conversions)
    values = {one.told["value"]: (one.module, one.told["phase"]) for one in predicted}
    layers = {module for module, _ in values.values()}
    assert layers >= ({f"layers.{i}.down" for i in range(3)} if name == "repeated" else {"layers.0", "layers.4"})
    for process in processes(measured.ranks(), compiled.statements()):
        assert collectives_of(process.slices) == planned
        own = [one for one in process.slices if one.track == COMPUTE]
        assert {one.kind for one in own} >= {"addmm", "mm"}
        found = {one.told["value"]: (one.module, one.told["phase"]) for one in own}
        assert values.items() <= found.items()
    (first, *_) = processes(measured.ranks(), compiled.statements())
    table = str(Report([], [differences(compiled.timeline(), first)]))
    assert all(module in table for module in layers if len(layers) <= 10)


def test_a_trace_that_cannot_be_written(stack: Compiled, tmp_path: Path) -> None:
    with pytest.raises(ShardcError, match=r"cannot be written: .*; name another file"):
        stack.trace(tmp_path / "no" / "such" / "folder.json")
