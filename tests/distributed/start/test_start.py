"""Models get their values under torch.distributed, over gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("script", "said"),
    [("weights.py", "weights are those of one device"), ("memory.py", "memory is as promised")],
)
def test_start(spawn: Callable[..., list[tuple[int, str]]], tmp_path: Path, script: str, said: str) -> None:
    for code, output in spawn(f"start/{script}", str(tmp_path / "files")):
        assert code == 0, output
        assert said in output, output
