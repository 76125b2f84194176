"""How the results of calls lie in memory, as the analysis of memory reckons with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class StoredTensor(NamedTuple):
    """One tensor in memory: the number of its storage, and its form within it."""

    storage: int
    form: TensorForm


@dataclass(frozen=True)
class TensorForm:
    """One result of a call: a view into the storage of an operand (`operand` counts the call's storages), or, where
    that is None, a new storage of `size` bytes. `offset` and `stride` are in elements."""

    operand: int | None
    size: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
