"""Models get their values under torch.distributed, over gloo."""

from __future__ import annotations

import re
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


def test_loops_that_people_have(spawn: Callable[..., list[tuple[int, str]]], tmp_path: Path) -> None:
    """Each of examples/loop_*.py: losses fall, and are the same on both ranks."""
    curves: list[dict[str, list[float]]] = []
    for code, output in spawn("start/loops.py", str(tmp_path / "files"), nproc=2):
        assert code == 0 and "all loops ended" in output, output
        parts = re.split(r"^loop (\w+)\n", output, flags=re.MULTILINE)[1:]
        curves.append({})
        for name, said in zip(parts[::2], parts[1::2], strict=True):
            curves[-1].setdefault(name, []).extend(map(float, re.findall(r"loss'?:? +'?([\d.]+)", said)))
        if not curves[1:]:
            assert re.search(r"step 3: .+ \(predicted .+\), [\d,]+ tokens a second, MFU [\d.]+% \(predicted", output), (
                output
            )
    first, second = curves
    assert first.keys() == {"plain", "lightning", "accelerate", "trainer"}
    for name in ("lightning", "accelerate", "trainer"):
        assert len(first[name]) >= 2 and first[name][-1] < first[name][0], first
    assert second["plain"] == first["plain"] and second["lightning"] == first["lightning"]
