"""`shardc calibrate` over gloo: the file it writes loads, and predicts what it did not measure."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import shardc
from shardc.cli import main

pytestmark = pytest.mark.distributed
Spawn = Callable[..., list[tuple[int, str]]]


def measured(spawn: Spawn, *asked: str, nproc: int) -> str:
    """What all ranks say."""
    codes, tellings = zip(*spawn(*asked, nproc=nproc), strict=True)
    assert not any(codes), tellings
    return "".join(tellings)


def test_the_file_predicts_a_size_that_was_not_measured(spawn: Spawn, tmp_path: Path) -> None:
    """Within a factor of two, in one of five trials, of at most four files: other work may disturb the rest."""
    path = tmp_path / "mine.toml"
    output = measured(spawn, "calibration/calibrated.py", str(path), nproc=2)
    ratios = [float(ratio) for ratio in re.findall(r"ratios (.*)", output)[0].split()]
    assert any(0.5 < ratio < 2 for ratio in ratios), output
    plan = shardc.compile(nn.Linear(8, 8), "tp=2", (torch.zeros(4, 8),), hardware=path).plan
    assert "on mine, mode=auto" in str(plan)


def test_axes_that_span_nodes_are_measured_by_themselves(spawn: Spawn, tmp_path: Path) -> None:
    output = measured(spawn, "calibration/calibrated_apart.py", str(tmp_path / "apart.toml"), nproc=4)
    assert "[between.spanning.all_to_all] # fitted to 2 sizes" in output and "along an axis that spans nodes" in output


def test_the_command_line_starts_the_processes_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "here.toml"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["calibrate", str(path), "--processes", "1"]) == 0, capfd.readouterr().err
    printed = capfd.readouterr().out
    assert f"wrote {path}" in printed and "float32" in printed
    assert "not measured: this run had no such link" in path.read_text()
    assert shardc.compile(nn.Linear(8, 8), "tp=2", (torch.zeros(4, 8),), hardware=str(path)).plan.cost > 0
