"""What `plan.diff` and `shardc diff` print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import shardc
from samples.towers import Tower
from shardc.cli import main
from shardc.explain.plan import Plan


def planned(**asked: object) -> Plan:
    inputs = (torch.ones(4096, 64),)
    asked |= {"hardware": "h100", "memory": "unbounded", "randomness": "independent"}  # as it would be on one
    return shardc.compile(Tower(64, 2), "dp=2,tp=2", inputs, **asked).plan  # type: ignore[arg-type]


def test_diff(
    golden: Callable[[str, str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Split layers moved to other axes, and nothing told of what stayed; in the shell the same; without a difference,
    so."""
    before = planned(constraints={"blocks.*.up.weight": ("tp", None)})
    after = planned(constraints={"blocks.*.up.weight": ("dp", None), "blocks.0.down.weight": (None, "tp")})
    text = str(before.diff(after))
    golden("layers", text + "\n")
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for plan, file in zip((before, after), files, strict=True):
        plan.save(file)
    assert main(["diff", *map(str, files)]) == 0
    assert capsys.readouterr().out == text + "\n"
    assert str(before.diff(files[0])).startswith("no change\n")
