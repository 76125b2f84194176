"""The Trainer of Hugging Face: a Llama whose weights are read from a folder, each rank its part.

torchrun --nproc-per-node 2 examples/loop_trainer.py FOLDER
(a checkpoint of a Llama; a small one is made where the folder has none)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import shardc
from text import Batches

SMALL = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


def main() -> None:
    parser = argparse.ArgumentParser(description="train a Llama with the Trainer")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mesh", default="dp=2")
    options = parser.parse_args()
    known = (options.folder / "config.json").exists()
    config = AutoConfig.from_pretrained(options.folder) if known else SMALL
    with shardc.deferred_init():
        model = AutoModelForCausalLM.from_config(config)

    # the Trainer deals every process other rows, so data= names all axes
    axes = ",".join(piece.partition("=")[0] for piece in options.mesh.split(","))
    model = shardc.shard(model, mesh=options.mesh, data=axes)
    torch.manual_seed(0)
    shardc.load_pretrained(model, options.folder) if known else shardc.materialize(model)

    rows = [{"input_ids": tokens, "labels": tokens} for tokens in next(Batches(batch=16, seq=16))[0]]
    arguments = TrainingArguments(
        str(options.folder / "runs"), per_device_train_batch_size=2, max_steps=4, logging_steps=1, learning_rate=3e-3,
        use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    shardc.save_pretrained(model, options.folder)


if __name__ == "__main__":
    main()
