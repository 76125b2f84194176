"""Batches of bytes from the book in examples/data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

BOOK = Path(__file__).parent / "data" / "alice.txt"


class Batches:
    """Endless pairs (bytes, the bytes one further on), each `[batch, seq]`; the same for the same seed. Its state is
    its place."""

    def __init__(self, batch: int, seq: int, seed: int = 0) -> None:
        self.batch = batch
        self.seq = seq
        self.book = torch.tensor(list(BOOK.read_bytes()), dtype=torch.int64)
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        starts = torch.randint(0, len(self.book) - self.seq - 1, (self.batch,), generator=self.generator)
        windows = torch.stack([self.book[start : start + self.seq + 1] for start in starts.tolist()])
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])
