"""Starting several gloo processes and reading what they said."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE))),
}


@pytest.fixture
def torchrun() -> Callable[..., str]:
    """`torchrun("script.py", "arg", nproc=4)`: the output of a script of this folder; fails unless it exits with 0."""

    def run(script: str, *arguments: str, nproc: int = 4, timeout: float = 120) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
        done = subprocess.run(
            [*command, str(HERE / script), *arguments],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


@pytest.fixture
def spawn() -> Callable[..., list[tuple[int, str]]]:
    """`spawn("script.py", "arg", nproc=4)`: exit code and output of each rank. Without torchrun, which ends the peers
    of a failed rank before they can say what they saw."""

    def run(script: str, *arguments: str, nproc: int = 4, timeout: float = 60) -> list[tuple[int, str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        ranks: list[subprocess.Popen[str]] = []
        for rank in range(nproc):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, str(HERE / script), *arguments],
                    env={**ENVIRONMENT, **own},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        return [(process.returncode, output) for process, output in zip(ranks, outputs, strict=True)]

    return run
