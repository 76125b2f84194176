"""Python programs in processes of their own that need not import torch first: a process that did forks for each.

    ran("examples/mlp.py").stdout            python examples/mlp.py
    ran("-m", "shardc.cli", "plan", ...)     python -m shardc.cli plan ...

Importing torch, its tracer and DTensor takes three seconds, and the compiler one more: longer than most of the
programs. What a test asks about the start of the interpreter, or about what is imported, needs a fresh process instead.
A copy of shardc in another place has a process of its own, which forks before anything of shardc is imported.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
Finished = subprocess.CompletedProcess[str]

SERVER = """
import gc, json, os, runpy, sys
import torch, torch._dynamo, torch.distributed.tensor, torch._functorch.aot_autograd
if len(sys.argv) > 1:
    sys.path.insert(0, sys.argv[1])
    import shardc.api
    del sys.path[0]
gc.set_threshold(50_000, 20, 50)  # as in conftest.py
gc.collect()
gc.freeze()  # what was imported holds nothing of a program that is forked: no need to walk over it, which copies it

def program(asked):
    os.chdir(asked["cwd"])
    for number, file in ((1, "out"), (2, "err")):
        os.dup2(os.open(asked[file], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(asked["env"])
    module = asked["argv"][0] == "-m"
    sys.argv = asked["argv"][1:] if module else asked["argv"]
    first = asked["cwd"] if module else os.path.dirname(os.path.abspath(sys.argv[0]))
    sys.path[:] = [first, *filter(None, asked["env"].get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True) if module else runpy.run_path(
        sys.argv[0], run_name="__main__")

for line in sys.stdin:
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
program(json.loads(line))
"""


@functools.cache
def _server(compiler: Path | None) -> subprocess.Popen[str]:
    """The process that forks, with the compiler of this place, if one is to be imported before."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    started = subprocess.Popen(
        [sys.executable, "-c", SERVER, *([str(compiler)] if compiler else [])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    atexit.register(started.kill)
    return started


def ran(*argv: str, cwd: Path = ROOT, path: Path = ROOT, beside: Sequence[Path] = ()) -> Finished:
    """What a program prints, and its exit code; `argv` as after `python`, `path` is what it imports shardc from, and
    `beside` are further places to import from."""
    server = _server(ROOT if path == ROOT else None)
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (path, *beside)))}
        asked = {"argv": argv, "cwd": str(cwd), "env": environment, "out": str(out), "err": str(err)}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = server.stdout.readline()
        assert code, "the process that forks has ended"
        return Finished(argv, int(code), out.read_text(), err.read_text())
