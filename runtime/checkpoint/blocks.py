"""The part of a DTensor that a rank holds, as blocks of the global tensor: what checkpoints write and read.

    a weight of 12 rows, a third each for query, key and value, split within each third over two ranks
        rank 0 holds rows 0-1, 4-5, 8-9: three blocks

torch.distributed.checkpoint takes one block a rank for a DTensor, which is wrong there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard  # pyright: ignore

from shardc.runtime.errors import ShardcError

Run = tuple[int, int]
"""First position and length of consecutive positions of a dim."""


class PlacedBlock(NamedTuple):
    """Where a block begins in the global tensor and in the rank's part, and its sizes: an entry a dim."""

    offsets: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]


class Blocks:
    """A rank's part of a DTensor, as torch.distributed.checkpoint asks for it.

    `local` is the part, and `shape` that of the global tensor. What is loaded is written into `local`.
    """

    def __init__(self, shape: torch.Size, local: Tensor, blocks: Sequence[PlacedBlock]) -> None:
        self.shape = shape
        self.local = local
        self.blocks = {block.offsets: block for block in blocks}

    @staticmethod
    def of(tensor: DTensor, local: Tensor) -> Blocks:
        """Of a DTensor, with `local` as the rank's part: its own, or a copy of that.

        ShardcError for parts that are yet to be summed, and for a split that torch itself stores in another way.
        """
        coordinate, sizes = tensor.device_mesh.get_coordinate(), tensor.device_mesh.shape
        runs = [[(0, size)] for size in tensor.shape]
        for axis, placement in enumerate(tensor.placements):
            if isinstance(placement, (Shard, _StridedShard)) and coordinate is not None:
                dim = placement.dim % tensor.dim()
                runs[dim] = _own(runs[dim], placement, sizes[axis], coordinate[axis])
            elif not isinstance(placement, Replicate):
                raise ShardcError(f"a tensor that lies as {placement} cannot be saved: call full_tensor() on it first")
        if coordinate is None:
            return Blocks(tensor.shape, local, [])
        held = tuple(sum(length for _, length in one) for one in runs)
        if held != tuple(local.shape):
            raise ShardcError(
                f"a tensor of shape {tuple(tensor.shape)} lies as {tensor.placements}, of which this rank should hold "
                f"{held}, but holds {tuple(local.shape)}: redistribute it to Shard or Replicate before it is saved"
            )
        return Blocks(tensor.shape, local, _blocks(runs))

    def size(self) -> torch.Size:
        """The shape of the global tensor."""
        return self.shape

    def block(self, offset: Sequence[int] | None) -> Tensor:
        """The part of `local` that begins at `offset` of the global tensor."""
        block = self.blocks[tuple(offset or ())]
        view = self.local
        for dim, (start, size) in enumerate(zip(block.starts, block.sizes, strict=True)):
            view = view.narrow(dim, start, size)
        return view

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(name, offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(block), properties, self.shape),
            )
            for offsets, block in self.blocks.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(block) for block in self.blocks.values()]


def _chunk(block: PlacedBlock) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.sizes))


def _blocks(runs: Sequence[Sequence[Run]]) -> list[PlacedBlock]:
    """Every combination of the runs of all dims."""
    placed: list[list[tuple[int, int, int]]] = []
    for one in runs:
        ends = itertools.accumulate((length for _, length in one), initial=0)
        placed.append([(first, start, length) for (first, length), start in zip(one, ends, strict=False)])
    return [
        PlacedBlock(
            tuple(first for first, _, _ in chosen),
            tuple(start for _, start, _ in chosen),
            tuple(length for _, _, length in chosen),
        )
        for chosen in itertools.product(*placed)
    ]


def _own(runs: list[Run], placement: Placement, ranks: int, position: int) -> list[Run]:
    """What of `runs` the rank at `position` holds, as torch splits: into chunks of equal size but for the last."""
    factor = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
    pieces = [_taken(runs, factor, piece) for piece in range(factor)]
    own = [run for piece in pieces for run in _taken(piece, ranks, position)]
    merged: list[Run] = []
    for first, length in own:
        if merged and sum(merged[-1]) == first:
            merged[-1] = merged[-1][0], merged[-1][1] + length
        else:
            merged.append((first, length))
    return merged


def _taken(runs: list[Run], pieces: int, which: int) -> list[Run]:
    total = sum(length for _, length in runs)
    size = -(-total // pieces)
    begin, end = which * size, (which + 1) * size
    taken: list[Run] = []
    at = 0
    for first, length in runs:
        low, high = max(begin, at), min(end, at + length)
        if low < high:
            taken.append((first + low - at, high - low))
        at += length
    return taken
