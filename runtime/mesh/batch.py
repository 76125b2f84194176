"""A batch of which every rank brings its own part: `shard(model, data="dp")`.

    rank 0: x f32[4, 64], rank 1: x f32[4, 64]     ->   the program's input: f32[8@dp, 64]
    the program's output: f32[8@dp, 10]            ->   rank 0: f32[4, 10], rank 1: f32[4, 10]

Parts may differ in size, and be empty. Then the batch is gathered on every rank, and cut again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from shardc.runtime.errors import RankError
from shardc.runtime.mesh.agreement import meeting
from shardc.runtime.mesh.distributed import DistributedMesh


@dataclass(frozen=True)
class Batch:
    """How the ranks of `axes` share the batch: the sizes of their parts, row-major, and the number of this rank's."""

    mesh: DistributedMesh
    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    own: int

    @property
    def total(self) -> int:
        """The size of the global batch."""
        return sum(self.sizes)

    @property
    def even(self) -> bool:
        """Whether all parts are of one size, which is not zero: as DTensor has them."""
        return len(set(self.sizes)) == 1 and self.total > 0

    @property
    def placements(self) -> tuple[Placement, ...]:
        """How the parts lie, for even ones."""
        return placements_of(self.axes, self.mesh)

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of the global batch."""
        return whole.narrow(0, sum(self.sizes[: self.own]), self.sizes[self.own])

    def joined(self, part: Tensor) -> Tensor:
        """The tensor of the global batch, from a part on every rank: a DTensor, or whole where parts are not even."""
        part = part.detach().to(self.mesh.device(self.mesh.rank)).contiguous()
        if self.even:
            return DTensor.from_local(part, self.mesh.device_mesh, self.placements, run_check=False)
        most = max(self.sizes)
        rows = part.new_zeros((most, *part.shape[1:]))
        rows[: part.shape[0]] = part
        raw = rows.view(-1).view(torch.uint8)
        for axis in reversed([axis for axis in self.mesh.axes if axis in self.axes]):
            gathered = [torch.empty_like(raw) for _ in range(self.mesh.axes[axis])]
            if raw.numel():
                with meeting(f"all_gather of the parts of the batch over axis {axis!r}"):
                    dist.all_gather(gathered, raw, group=self.mesh.device_mesh.get_group(axis))
            raw = torch.cat(gathered)
        parts = raw.view(rows.dtype).view(len(self.sizes), *rows.shape)
        return torch.cat([rows[:size] for rows, size in zip(parts, self.sizes, strict=True)])


def axes_of(data: str, mesh: DistributedMesh) -> tuple[str, ...]:
    """The axes that `data=` names, in the order of the mesh."""
    return tuple(axis for axis in mesh.axes if axis in {name.strip() for name in data.split(",")})


def placements_of(axes: Sequence[str], mesh: DistributedMesh) -> tuple[Placement, ...]:
    """How even parts of a batch lie that is split along `axes`."""
    return tuple(Shard(0) if axis in axes else Replicate() for axis in mesh.axes)


def join(leaves: Sequence[Any], mesh: DistributedMesh, axes: tuple[str, ...]) -> tuple[list[Any], Batch | None]:
    """The inputs of the global batch, from each rank's own. The first tensor with dims tells the size of the part;
    every tensor of that size in dim 0 is a part, the others are the same on all ranks. Every rank must call it."""
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), None)
    if first is None or isinstance(first, DTensor):
        return list(leaves), None
    size = first.shape[0]
    batch = _batch(size, mesh, axes)

    def is_part(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and not isinstance(leaf, DTensor) and leaf.ndim > 0 and leaf.shape[0] == size

    return [_Join.apply(leaf, batch) if is_part(leaf) else leaf for leaf in leaves], batch


def own_parts(leaves: Sequence[Any], batch: Batch) -> list[Any]:
    """The results of the global batch, as this rank's own: its part of what has the batch in dim 0."""

    def is_batch(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch.total

    return [_Own.apply(leaf, batch) if is_batch(leaf) else leaf for leaf in leaves]


def _batch(size: int, mesh: DistributedMesh, axes: tuple[str, ...]) -> Batch:
    """Ranks exchange the sizes of their parts."""
    device = mesh.device(mesh.rank)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(mesh.size)]
    with meeting("the exchange of the sizes of the parts of the batch"):
        dist.all_gather(sizes, torch.tensor([size], device=device))
    known: dict[int, tuple[int, int]] = {}
    for rank, one in enumerate(torch.cat(sizes).tolist()):
        number = part_number(mesh, axes, rank)
        other, said = known.setdefault(number, (rank, one))
        if said != one:
            raise RankError(
                f"ranks {other} and {rank} bring the same part of the batch, for they differ in axes other than "
                f"{', '.join(axes)}; but rank {other} brings {said} rows and rank {rank} brings {one}",
                rank=mesh.rank,
            )
    count = math.prod(mesh.axes[axis] for axis in axes)
    return Batch(mesh, axes, tuple(known[n][1] for n in range(count)), part_number(mesh, axes, mesh.rank))


def part_number(mesh: DistributedMesh, axes: Sequence[str], rank: int) -> int:
    """Which part of the batch a rank brings."""
    number, place = 0, mesh.coordinates(rank)
    for axis in axes:
        number = number * mesh.axes[axis] + place[axis]
    return number


class _Join(torch.autograd.Function):
    """This rank's part becomes the global batch; backward, its rows of the gradient come back."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, batch: Batch) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.batch = batch
        return batch.joined(part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _own_part(gradient, ctx.batch), None


class _Own(torch.autograd.Function):
    """The global batch becomes this rank's part. A loss that the caller makes of its part counts as a mean over it, as
    under DistributedDataParallel: the gradient is that of the mean over the global batch."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, batch: Batch) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.batch = batch
        return _own_part(whole, batch)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch: Batch = ctx.batch
        return batch.joined(gradient * (batch.sizes[batch.own] / max(batch.total, 1))), None


def _own_part(whole: Tensor, batch: Batch) -> Tensor:
    if not isinstance(whole, DTensor):
        return batch.part(whole).clone()
    if batch.even:
        return whole.redistribute(batch.mesh.device_mesh, batch.placements).to_local().contiguous()
    return batch.part(whole.full_tensor()).contiguous()
