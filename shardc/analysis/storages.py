"""Tensors in memory: which storage each occupies, and what is held line by line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Lines(NamedTuple):
    """What a rank holds line by line: the bytes while each line of `forward` and `backward` runs, and per value, by its
    name, the storages of its tensors with their bytes. `peak` is the most."""

    peak: float
    held: Mapping[str, Sequence[float]]
    storages: Mapping[str, tuple[tuple[int, int], ...]]


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


def form_of(one: Any, numbers: Mapping[int, int]) -> TensorForm | None:
    if not isinstance(one, Tensor):
        return None
    storage = one.untyped_storage()
    stride, offset = tuple(one.stride()), int(one.storage_offset())
    return TensorForm(numbers.get(storage._cdata), storage.nbytes(), tuple(one.shape), stride, offset, one.dtype)
