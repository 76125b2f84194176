"""Accelerate around a sharded model: it deals the rows, and leaves the model as it is.

torchrun --nproc-per-node 2 examples/loop_accelerate.py
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import shardc
from gpt import GPT, Config
from text import Batches


def main() -> None:
    parser = argparse.ArgumentParser(description="train a GPT with Accelerate")
    parser.add_argument("--mesh", default="dp=2")
    options = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    # Accelerate deals every process other rows, so data= names all axes
    axes = ",".join(piece.partition("=")[0] for piece in options.mesh.split(","))
    model = shardc.shard(GPT(Config(layers=1)), mesh=options.mesh, data=axes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(TensorDataset(*next(Batches(batch=16, seq=32))), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for tokens, targets in shardc.progress(loader, model, every=1):
        loss = model(tokens, targets)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"loss {loss.item():.6f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
