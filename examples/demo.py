"""What `make demo` shows: a plan for Llama-3-8B on 32 GPUs, then a mesh and a single device that train alike."""

from __future__ import annotations

import copy
import sys

import torch
from torch import nn

import llama
import shardc
from shardc import shard
from shardc.inspect.console import show
from shardc.inspect.progress import tracked, working
from text import Batches

STEPS = 30
MESH = "dp=2,tp=2"
TOLERANCE = 1e-4


def plan_8b() -> None:
    """Plan the 8B model, which is never allocated."""
    print("Llama-3-8B, 32 sequences of 4096 tokens, bf16, on 4 nodes of 8 H100: dp=4,tp=8\n")
    with working("planning Llama-3-8B"):
        compiled = shardc.compile(llama.model(), "dp=4,tp=8", llama.inputs(), hardware="h100")
    show(compiled.plan.report())


def train(model: nn.Module, what: str) -> list[float]:
    """The losses of STEPS steps of AdamW on the bytes of the book; every call sees the same batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = Batches(batch=8, seq=64)
    losses: list[float] = []
    for _ in tracked(range(STEPS), what):
        tokens, _ = next(data)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_both() -> float:
    """Train a small Llama on one device and on a virtual mesh; the largest difference of the losses."""
    print(f"\nA small Llama on the bytes of Alice in Wonderland, {STEPS} steps of AdamW\n")
    torch.manual_seed(0)
    single = llama.build("tiny")
    sharded = shard(copy.deepcopy(single), mesh=MESH)
    alone = train(single, "one device       ")
    meshed = train(sharded, f"mesh {MESH}   ")
    print(f"\n{'step':>4}  {'one device':>11}  {'mesh ' + MESH:>14}  {'difference':>10}")
    for step, (a, b) in enumerate(zip(alone, meshed, strict=True)):
        print(f"{step:4d}  {a:11.6f}  {b:14.6f}  {abs(a - b):10.1e}  {'▪' * round(8 * b)}")
    return max(abs(a - b) for a, b in zip(alone, meshed, strict=True))


def main() -> None:
    torch.set_num_threads(1)  # the model that is trained is too small for more
    plan_8b()
    largest = train_both()
    print(f"\nlargest difference of the losses: {largest:.1e}")
    if largest > TOLERANCE:
        sys.exit(f"that is more than {TOLERANCE:.0e}: the mesh does not compute what one device does")


if __name__ == "__main__":
    main()
