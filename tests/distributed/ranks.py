"""Runs a script in several processes, forks of one that has imported the compiler: importing takes most of a short run.

    python ranks.py FOLDER COUNT SCRIPT [ARGUMENT...]

What rank k says goes to FOLDER/k, and its exit code to FOLDER/k.code. Unlike torchrun, it leaves the peers of a rank
that fails alone, so that they can say what they saw. After ten minutes it ends them all.
"""

import os
import runpy
import signal
import socket
import sys
from pathlib import Path

import shardc.api  # noqa: F401  (for the ranks)

folder, count, script, *arguments = sys.argv[1:]
if script.endswith("zoo.py"):
    import samples.models  # noqa: F401  (the same)

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}


def run(rank: int) -> None:
    """The script, as this rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "SHARDC_VERIFY": str(int(rank == 0))}  # one program
    said = os.open(Path(folder, str(rank)), os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


ranks: dict[int, int] = {}
for rank in range(int(count)):
    child = os.fork()
    if not child:
        run(rank)
        sys.exit()
    ranks[child] = rank


def end(*_: object) -> None:
    """End ranks that hang."""
    print(f"still running after ten minutes: ranks {sorted(ranks.values())}")
    for child in ranks:
        os.kill(child, signal.SIGKILL)


signal.signal(signal.SIGALRM, end)
signal.alarm(600)
while ranks:
    child, status = os.wait()
    Path(folder, f"{ranks.pop(child)}.code").write_text(str(os.waitstatus_to_exitcode(status)))
