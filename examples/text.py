"""Batches of bytes from the book in examples/data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

BOOK = Path(__file__).parent / "data" / "alice.txt"


def batches(batch: int, seq: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pairs (bytes, the bytes one further on), each `[batch, seq]`; the same for the same seed."""
    book = torch.tensor(list(BOOK.read_bytes()), dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(book) - seq - 1, (batch,), generator=generator)
        windows = torch.stack([book[start : start + seq + 1] for start in starts.tolist()])
        yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
