"""Runs that are killed and go on from their last checkpoint, on other meshes, are the run of one device."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checks.fuzz import SEED, TIMES
from checks.preloaded import ROOT, ran

pytestmark = pytest.mark.distributed
HERE = Path(__file__).parent
KILLS = 30
"""So many with SHARDC_FUZZ, in a longer run; else one."""


def test_a_killed_run_goes_on_on_another_mesh(tmp_path: Path) -> None:
    """On dp=4, then on dp=2; `resumes.py` compares the losses of every step, and says why it fails."""
    steps, kills = (200, KILLS) if TIMES > 1 else (60, 1)
    asked = [str(tmp_path), str(steps), str(kills), str(SEED)]
    done = ran(str(HERE / "beside/resumes.py"), *asked, beside=(HERE.parent, HERE))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{steps} steps equal one device through {kills} kills" in done.stdout


@pytest.mark.skipif(TIMES == 1, reason="it starts torchrun three times, which takes a minute: run with SHARDC_FUZZ=2")
def test_torchrun_starts_the_ranks_again(tmp_path: Path) -> None:
    """`examples/resume.py`, of which a process is killed; then on fewer processes, and then on a virtual mesh."""
    script = [str(ROOT / "examples/resume.py"), "--folder", str(tmp_path)]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--max-restarts",
        "1",
        "--nproc-per-node",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as the example says
    losses: dict[int, list[float]] = {}
    killed = False
    for command, steps in (([*torchrun, "4"], 60), ([*torchrun, "2"], 80), ([sys.executable], 100)):
        ours = subprocess.Popen(
            [*command, *script, "--steps", str(steps)], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert ours.stdout is not None
        for line in ours.stdout:
            if named := re.match(r"step +(\d+)  loss ([\d.]+)", line):
                losses.setdefault(int(named[1]), []).append(float(named[2]))
                if int(named[1]) == 30 and not killed:
                    children = Path(f"/proc/{ours.pid}/task/{ours.pid}/children").read_text().split()
                    os.kill(int(children[-1]), signal.SIGKILL)
                    killed = True
                    time.sleep(1)
        assert ours.wait() == 0
    assert sorted(losses) == list(range(100))
    assert any(len(twice) == 2 for twice in losses.values())
    for twice in losses.values():
        assert max(twice) - min(twice) < 1e-4
