"""Trains a GPT on the bytes of a book. One process holds a virtual mesh; under torchrun each process is a device.

python examples/train.py
torchrun --nproc-per-node 4 examples/train.py
"""

from __future__ import annotations

import argparse
import os

import torch

from gpt import GPT, Config
from shardc import shard
from shardc.inspect.progress import tracked
from text import Batches


def main() -> None:
    parser = argparse.ArgumentParser(description="train a GPT on the bytes of a book")
    parser.add_argument("--mesh", default="dp=2,tp=2")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dropout", type=float, default=0.1)
    options = parser.parse_args()
    first = os.environ.get("RANK", "0") == "0"

    torch.manual_seed(0)
    model = shard(GPT(Config(dropout=options.dropout)), mesh=options.mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = Batches(batch=16, seq=64)
    for step in tracked(range(options.steps), "training"):
        loss = model(*next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if first and (step % 10 == 0 or step == options.steps - 1):
            print(f"step {step:4d}  loss {loss.item():.6f}")
    if first:
        print(model.plan)


if __name__ == "__main__":
    main()
