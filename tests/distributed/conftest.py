"""Starting several gloo processes and reading what they said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from checks.preloaded import ran

HERE = Path(__file__).parent
PLACES = (HERE.parent, HERE)
"""From where the scripts of this folder import, beside shardc."""


@pytest.fixture
def spawn(tmp_path: Path) -> Callable[..., list[tuple[int, str]]]:
    """`spawn("script.py", "arg", nproc=4)`: exit code and output of each rank, which `ranks.py` starts."""

    def run(script: str, *arguments: str, nproc: int = 4) -> list[tuple[int, str]]:
        done = ran(str(HERE / "ranks.py"), str(tmp_path), str(nproc), str(HERE / script), *arguments, beside=PLACES)
        assert done.returncode == 0, done.stdout + done.stderr
        names = [tmp_path / str(rank) for rank in range(nproc)]
        return [(int(name.with_suffix(".code").read_text()), name.read_text()) for name in names]

    return run
