"""Lightning around a sharded model: every process runs the loop on its own, and the model does the rest.

torchrun --nproc-per-node 2 examples/loop_lightning.py
"""

from __future__ import annotations

import argparse

import pytorch_lightning as lightning
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import shardc
from gpt import GPT, Config
from text import Batches


class Training(lightning.LightningModule):
    def __init__(self, mesh: str) -> None:
        super().__init__()
        self.model = shardc.shard(GPT(Config(layers=1)), mesh=mesh, data="dp")

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = self.model(*batch)
        print(f"loss {loss.item():.6f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description="train a GPT with Lightning")
    parser.add_argument("--mesh", default="dp=2")
    options = parser.parse_args()

    torch.manual_seed(0)
    training = Training(options.mesh)
    rows = TensorDataset(*next(Batches(batch=16, seq=32)))
    loader = DataLoader(rows, batch_size=4, sampler=shardc.data_sampler(rows, training.model, shuffle=False))
    # Lightning is told of one device: it would wrap the model for several
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="auto", devices=1, plugins=[LightningEnvironment()], gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(training, loader)


if __name__ == "__main__":
    main()
