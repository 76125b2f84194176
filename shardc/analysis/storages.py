"""Tensors in memory: which storage each occupies, and in which form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
