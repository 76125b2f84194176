"""Starting several gloo processes and reading what they said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from checks.preloaded import ROOT, ran

HERE = Path(__file__).parent
PLACES = (HERE.parent, HERE)
"""From where the scripts of this folder import, beside shardc."""
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *PLACES))),
}
PATIENCE = 600.0
"""Seconds after which processes are taken to hang, as in `ranks.py`: many times what they take on an idle machine."""


@pytest.fixture
def torchrun() -> Callable[..., str]:
    """`torchrun("script.py", "arg", nproc=4)`: the output of a script of this folder; fails unless it exits with 0."""

    def run(script: str, *arguments: str, nproc: int = 4) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
        code, output = _started([*command, str(HERE / script), *arguments])
        assert code == 0, output
        return output

    return run


@pytest.fixture
def spawn(tmp_path: Path) -> Callable[..., list[tuple[int, str]]]:
    """`spawn("script.py", "arg", nproc=4)`: exit code and output of each rank, which `ranks.py` starts."""

    def run(script: str, *arguments: str, nproc: int = 4) -> list[tuple[int, str]]:
        done = ran(str(HERE / "ranks.py"), str(tmp_path), str(nproc), str(HERE / script), *arguments, beside=PLACES)
        assert done.returncode == 0, done.stdout + done.stderr
        names = [tmp_path / str(rank) for rank in range(nproc)]
        return [(int(name.with_suffix(".code").read_text()), name.read_text()) for name in names]

    return run


def _started(command: list[str]) -> tuple[int, str]:
    """Exit code and output; after PATIENCE seconds all processes are ended, and the test fails."""
    ours = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output = ours.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired:
        os.killpg(ours.pid, signal.SIGKILL)
        pytest.fail(f"still running after {PATIENCE:.0f} s:\n{ours.communicate()[0]}")
    return ours.returncode, output
