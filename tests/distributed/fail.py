"""One rank raises, is killed, hangs or is stopped in the middle of a run; the others must say where they were. The one
that is stopped is rank 0, which keeps the store. Run per rank."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from shardc.runtime import current, load, local_mesh

SOURCE = """
from shardc.runtime import all_reduce, wait
def forward(x, accident):
    h = all_reduce(x, axis="a")  # warm up
    h = accident(h)  # the accident, model.py:7
    started = all_reduce.start(h, axis="a")
    y = wait(started)  # f32[4]  # down, model.py:8
    return all_reduce(y, axis="b")  # model.py:9
"""


def accident(h):
    if sys.argv[1] == "stop" and current().rank == 0:
        subprocess.Popen(["sh", "-c", f"sleep 7; kill -KILL {os.getpid()}"])  # nobody else would
        os.kill(os.getpid(), signal.SIGSTOP)
    elif current().rank == dist.get_world_size() - 1:
        if sys.argv[1] == "raise":
            return h.view(3)
        if sys.argv[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "hang":
            time.sleep(8)
    return h


dist.init_process_group("gloo", timeout=timedelta(seconds=3))
mesh = local_mesh({"a": 2, "b": dist.get_world_size() // 2})
begin = time.monotonic()
try:
    mesh.run(load(SOURCE).forward, lambda _: (torch.ones(4), accident))
finally:
    print(f"ended after {time.monotonic() - begin:.1f} s", flush=True)
