"""Trains through failures. If a process dies, the others end; torchrun starts them again, and they go on from the last
checkpoint, on as many processes as are left.

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1    else torch 2.13 looks for the processes that died
torchrun --nproc-per-node 4 --max-restarts 3 examples/resume.py
torchrun --nproc-per-node 2 examples/resume.py --steps 400    on other processes, from where the first ended
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist

import shardc
from gpt import GPT, Config
from text import Batches


def main() -> None:
    parser = argparse.ArgumentParser(description="train a GPT on the bytes of a book, through failures")
    parser.add_argument("--folder", default="checkpoints")
    parser.add_argument("--mesh", help="one axis over all processes where none is named")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # after which a rank counts as lost

    torch.manual_seed(0)
    config = Config(width=32, layers=1, heads=2, dropout=0.1)
    model = shardc.shard(GPT(config), mesh=options.mesh or f"dp={os.environ.get('WORLD_SIZE', 1)}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    data = Batches(batch=16, seq=32)

    start = shardc.load_checkpoint(options.folder, model, optimizer, scheduler=scheduler, data=data) or 0
    for step in range(start, options.steps):
        loss = model(*next(data))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if os.environ.get("RANK", "0") == "0":
            print(f"step {step:4d}  loss {loss.item():.6f}", flush=True)
        if (step + 1) % 20 == 0:
            named = {"scheduler": scheduler, "data": data}
            shardc.save_checkpoint(options.folder, model, optimizer, step=step + 1, keep=3, **named)


if __name__ == "__main__":
    main()
