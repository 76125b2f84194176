"""Ranks that do not do the same are told so, long before the process group's timeout. Run per rank.

differ.py alike      all come, with other inputs, modes, options, models: they can go on afterwards
differ.py known      the last rank runs a program that it knows, the others come with a new one
differ.py barrier    the last rank waits in a collective of its own
differ.py gone       the last rank has ended
"""

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from shardc import ShardcError, shard

dist.init_process_group("gloo", timeout=timedelta(seconds=20))
torch.set_num_threads(1)
rank = dist.get_rank()
last = rank == dist.get_world_size() - 1


def net(width=8):
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 8))


def told(call, *words):
    begin = time.monotonic()
    try:
        call()
    except ShardcError as error:
        for word in words:
            assert word in str(error), (word, str(error))
        print(f"told after {time.monotonic() - begin:.1f} s: {error}", flush=True)
    else:
        raise AssertionError(f"nobody told of {words}")


def alike():
    made = {"hardware": "cpu", "mesh": "tp=2"}
    told(lambda: shard(net(12 if last else 8), **made), "0.weight", "rank 0", "[8, 8]", "rank 1", "[12, 8]")
    model = shard(net(), **made)
    told(lambda: model(torch.ones(4 + last, 8)), "inputs", "float32[4, 8]", "float32[5, 8]", "data=")
    told(lambda: model(torch.full((4, 8), float(last))), "different values", "data=")

    def quietly():
        with torch.set_grad_enabled(not last):
            model(torch.ones(6, 8))

    told(quietly, "gradients", "recorded")
    told(lambda: shard(net(), **made, outputs="full" if last else "sharded")(torch.ones(4, 8)), "outputs")
    with torch.no_grad():
        model(torch.ones(3, 8))


def elsewhere(accident):
    model = shard(net(), hardware="cpu", mesh="tp=2", constraints={"0.weight": ("tp", None)})
    model(torch.ones(4, 8))
    if not last:
        told(lambda: model(torch.ones(6, 8)), "rank 1")
        print("exits", flush=True)
        os._exit(0)
    begin = time.monotonic()
    try:
        if accident == "known":
            model(torch.ones(4, 8))
        elif accident == "barrier":
            dist.barrier()
    except Exception as error:
        print(f"ended after {time.monotonic() - begin:.1f} s: {type(error).__name__}: {error}", flush=True)


{"alike": alike}.get(sys.argv[1], lambda: elsewhere(sys.argv[1]))()
print(f"rank {rank} is right", flush=True)
