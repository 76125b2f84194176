"""A dim that the mesh splits, as the running rank sees it: the rank's part, and collectives over all parts. And what a
micro-batch has of values that do not depend on the batch: micro-batches run one after another, as ranks of an axis
`time` would side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardc.runtime.collectives.all_gather import all_gather
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.runtime.collectives.permute import permute
from shardc.runtime.errors import RankError
from shardc.runtime.mesh.bands import Runs, runs_of_parts
from shardc.runtime.mesh.mesh import TIME, current
from shardc.runtime.mesh.orders import BLOCKS, axis_of, extent, order_of

__all__ = ["Part", "addend_of_microbatch", "part_of_microbatch"]


@dataclass(frozen=True, repr=False)
class Part:
    """A dim of global `size`, split over mesh `axes`, major to minor. The size of a part is a multiple of `unit`.

    `Part(("tp",), 10)` on four ranks gives chunks of 3, 3, 3 and 1 elements. A short or empty chunk is padded at its
    end, so the local dim has the same size on every rank. A part of `Part(("cp~folded",), 16)` is two runs; only bodies
    that ask for `runs` get such a part.
    """

    axes: tuple[str, ...]
    size: int
    unit: int = 1

    def __repr__(self) -> str:
        return f"Part({self.axes}, {self.size}{f', {self.unit}' if self.unit != 1 else ''})"

    @property
    def count(self) -> int:
        """The number of parts."""
        return math.prod(self._counts)

    @property
    def runs(self) -> Runs:
        """`(start, length)` of every run of consecutive global positions that the part has, in local order, without
        padding."""
        return self.all_runs[self.index]

    @property
    def all_runs(self) -> tuple[Runs, ...]:
        """The runs of every part, in order."""
        return runs_of_parts(self.size, self.axes, self._counts, self.unit)

    def positions(self, device: torch.device | None = None) -> Tensor:
        """The global positions of the local dim. Those of padding follow on the last one."""
        runs = [torch.arange(start, start + length, device=device) for start, length in self.runs]
        missing, end = self.length - self.valid, self.runs[-1][0] + self.runs[-1][1]
        return torch.cat([*runs, torch.arange(end, end + missing, device=device)] if missing else runs)

    @property
    def index(self) -> int:
        """The number of the rank's part."""
        context, number = current(), 0
        for axis in map(axis_of, self.axes):
            number = number * context.size(axis) + context.coordinates[axis]
        return number

    @property
    def start(self) -> int:
        """The global position of the part's first element. RankError where the part has more than one run."""
        if any(order_of(axis) != BLOCKS for axis in self.axes):
            raise RankError(f"{self} has no single start: it is dealt out in several runs, which `runs` lists")
        return self._extent()[0]

    @property
    def length(self) -> int:
        """Elements of the local dim, padding included; the same on every rank."""
        return self._extent()[1]

    @property
    def valid(self) -> int:
        """Elements of the local dim without padding. They come first."""
        return self._extent()[2]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """`(start, valid)` of every part, in order. One that is empty starts at the end, where tensors can be cut."""
        places = itertools.product(*map(range, self._counts))
        extents = (extent(self.size, self._counts, place, self.unit) for place in places)
        return [(min(start, self.size), valid) for start, _, valid in extents]

    @property
    def _counts(self) -> tuple[int, ...]:
        return tuple([current().size(axis_of(axis)) for axis in self.axes])

    def _extent(self) -> tuple[int, int, int]:
        """Start, length and valid elements of the rank's part."""
        return extent(self.size, self._counts, [current().coordinates[axis_of(axis)] for axis in self.axes], self.unit)

    def fill(self, x: Tensor, dim: int, value: float) -> Tensor:
        """`x` with `value` in the padding of its local `dim`. For booleans, a value above zero is true."""
        if self.size == self.length * self.count:
            return x
        shape = [1] * x.dim()
        shape[dim] = self.length
        padding = torch.arange(self.length, device=x.device) >= self.valid
        filling = value > 0 if x.dtype is torch.bool else value
        return torch.where(padding.view(shape), torch.full((), filling, dtype=x.dtype, device=x.device), x)

    def reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """The reduction of `x` over all parts."""
        for axis in reversed(self.axes):
            x = all_reduce(x, axis=axis_of(axis), op=op)
        return x

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The `x` of all parts side by side along `dim`, in the order of the parts."""
        for axis in reversed(self.axes):
            x = all_gather(x, dim=dim, axis=axis_of(axis))
        return x

    def shifted(self, x: Tensor, by: int) -> Tensor:
        """The `x` of the part `by` parts before this one; the first part follows the last. The dim is split by one
        axis."""
        (axis,), count = self.axes, self.count
        return (
            permute(x, axis=axis_of(axis), sources=[(place - by) % count for place in range(count)])
            if by % count
            else x
        )


def by_dim(parts: Mapping[str, Part]) -> dict[int, Part]:
    """The parts that a body gets as keywords `d0`, `d1`, ..., by the number of the dim."""
    return {int(name[1:]): part for name, part in parts.items()}


def part_of_microbatch(x: Tensor, *, dim: int, count: int) -> Tensor:
    """The part of `dim` that the micro-batch under way has, of `count` equal ones. A copy: a view would keep all of
    `x`."""
    size = x.shape[dim] // count
    part = x.narrow(dim, current().coordinates[TIME] * size, size)
    return part.clone(memory_format=torch.contiguous_format)


def addend_of_microbatch(x: Tensor) -> Tensor:
    """`x` in the first micro-batch and zeros in the others, so that all of them add up to `x`."""
    return x if current().coordinates[TIME] == 0 else torch.zeros_like(x)
