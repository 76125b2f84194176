"""Parameters, batches and agreement under torch.distributed, over gloo."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

Spawn = Callable[..., list[tuple[int, str]]]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("accumulates.py", "programs equal one device"),
        ("lives.py", "programs equal one device"),
        ("optimizers.py", "programs equal one device"),
        ("mixes.py", "programs equal one device"),
        ("parts.py", "all parts are right"),
        ("refuses.py", "refused as it should be"),
    ],
)
def test_equals_one_device(spawn: Spawn, script: str, said: str) -> None:
    for code, output in spawn(f"beside/{script}"):
        assert code == 0, output
        assert said in output, output


def test_random_orders_of_what_people_do(spawn: Spawn) -> None:
    for code, output in spawn("beside/orders.py", "50", nproc=2):
        assert code == 0, output
        assert "50 orders equal one device" in output


@pytest.mark.parametrize("accident", ["alike", "known", "barrier", "gone"])
def test_ranks_that_differ_are_told(spawn: Spawn, accident: str) -> None:
    """In the words that `differ.py` looks for, and in seconds where the process group would wait for 20."""
    for code, output in spawn("beside/differ.py", accident, nproc=2):
        assert code == 0, output
        assert "is right" in output or "exits" in output, output
        assert all(float(seconds) < 10 for seconds in re.findall(r"(?:told|ended) after ([\d.]+) s", output)), output


def test_rank_0_plans_and_the_others_receive(spawn: Spawn, tmp_path: Path) -> None:
    """In `planned.py` no other rank may solve; all train like one device, also by a file, and all are told alike."""
    for code, output in spawn("planned.py", str(tmp_path / "plan.json"), nproc=2):
        assert code == 0, output
        assert "refused: no plan was found for tp=2 that holds at most 1000 B" in output
