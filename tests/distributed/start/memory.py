"""What a rank holds at most while a model gets its values, moves to its plan and is saved. For ranks.py."""

import ctypes
import re
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import shardc

FOLDER = Path(sys.argv[1])
RANKS, LAYERS, WIDTH = 4, 8, 1024
TENSOR = WIDTH * WIDTH * 4
SHARD = LAYERS * TENSOR // RANKS
M_MMAP_THRESHOLD = -3
SLACK = 8_000_000
"""Bytes for what is no tensor of the model (of 34 MB): sockets, plans, what gloo holds for ranks that are late."""


class Tower(nn.Sequential):
    def __init__(self, width):
        super().__init__(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))


def held():
    """Bytes of anonymous memory: mapped files belong to the page cache, which all ranks share."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@contextmanager
def at_most(what, bound, before):
    peak, done = [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], held())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    used = max(peak[0], held()) - before
    assert used <= bound + SLACK, f"{what}: {used / 1e6:.1f} MB, more than {bound / 1e6:.1f} MB"
    print(f"{what}: {used / 1e6:.1f} MB of {bound / 1e6:.1f} MB")


def sharded(width=WIDTH):
    with shardc.deferred_init():
        model = Tower(width)
    constraints = {"*.weight": (None, "dp")}
    return shardc.shard(model, mesh=f"dp={RANKS}", mode="propagate", hardware="cpu", constraints=constraints)


# glibc keeps freed pieces of up to 32 MB for later, where weights of real models go back to the system
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
dist.init_process_group("gloo")
torch.set_num_threads(1)
with torch.no_grad():  # what is imported and planned on the way stays
    shardc.materialize(sharded(8))(torch.ones(1, 8))
model = sharded()
before = held()
with at_most("drawn", SHARD + TENSOR, before):
    shardc.materialize(model)
with at_most("moved", SHARD + 2 * TENSOR + TENSOR // RANKS, before), torch.no_grad():
    model(torch.ones(1, WIDTH))  # gathered over another dim than 0: c10d's buffer, and the tensor
with at_most("saved", SHARD + 2 * TENSOR, before):
    shardc.save_pretrained(model, FOLDER / "tower")
del model
model = sharded()
before = held()
with at_most("loaded", SHARD + TENSOR, before):
    shardc.load_pretrained(model, FOLDER / "tower")
print("memory is as promised", flush=True)
dist.destroy_process_group()
