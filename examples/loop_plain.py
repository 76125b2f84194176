"""A plain loop: each rank its rows, a model that starts on the meta device, and weights that anybody reads.

torchrun --nproc-per-node 2 examples/loop_plain.py
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader, TensorDataset

import shardc
from gpt import GPT, Config
from text import Batches


def main() -> None:
    parser = argparse.ArgumentParser(description="train a GPT in a plain loop")
    parser.add_argument("--mesh", default="dp=2")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--save", default="gpt", help="the folder for the weights")
    options = parser.parse_args()

    with shardc.deferred_init():
        model = GPT(Config(layers=1))
    model = shardc.shard(model, mesh=options.mesh, data="dp")
    torch.manual_seed(0)
    shardc.materialize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = TensorDataset(*next(Batches(batch=32, seq=32)))
    sampler = shardc.data_sampler(rows, model)
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for tokens, targets in shardc.progress(DataLoader(rows, batch_size=4, sampler=sampler), model, every=2):
            loss = model(tokens, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}  loss {loss.item():.6f}")
    shardc.save_pretrained(model, options.save)


if __name__ == "__main__":
    main()
