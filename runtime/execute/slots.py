"""Inputs and outputs of a generated module: the slots, and the cuts between a global tensor and its local parts.

A cut `(dim, outer, axis)` views `dim` as `(outer, rest)`, keeps one chunk of `rest`, and merges the two again. The
rank's coordinate on the axis is the number of its chunk. Cuts apply one after the other. An axis may be written with
its order, as `cp~folded`: then the rank keeps two pieces of `rest`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard  # pyright: ignore

from shardc.runtime.errors import RankError
from shardc.runtime.mesh.orders import BLOCKS, axis_of, dealt, merged, order_of

Cuts = tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class Slot:
    """One input, output, tangent or gradient of a generated module.

    `role` ("parameter", "input", ...) and `name` say what it is to the user. `index` is its position among the flat
    inputs or outputs. `shape` is global, `dtype` a name such as "float32". Without `cuts` it is whole on every rank.

    `order` lists the dims as they lie in one device's memory, major to minor; it is empty where that is contiguous.
    There is no gradient (None, not zeros) where none of the outputs `depends_on` got one. Where it is empty, there is
    always one.

    In a module for micro-batches, `batch` is the dim of which each has a part, and how many there are; the cuts are
    those of the part. What `sums` is the sum of what they make. All else is the same in each.
    """

    role: str
    name: str
    index: int
    shape: tuple[int, ...]
    dtype: str
    cuts: Cuts
    order: tuple[int, ...] = ()
    depends_on: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    sums: bool = False

    def __str__(self) -> str:
        return f"{self.role} {self.name or self.index}"

    @property
    def gradient(self) -> Slot:
        """The slot of the gradient of a parameter that lies as the parameter does."""
        return replace(self, role="gradient")

    @property
    def of_microbatch(self) -> Slot:
        """The slot of what one micro-batch takes or makes."""
        if not self.batch:
            return self
        dim, count = self.batch
        shape = list(self.shape)
        shape[dim] //= count
        return replace(self, shape=tuple(shape), batch=())

    def check(self, tensor: Tensor) -> None:
        """RankError unless `tensor` has this slot's global shape and dtype."""
        if tensor.shape != self.shape or tensor.dtype != getattr(torch, self.dtype):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise RankError(
                f"{self} must be {self.dtype}{list(self.shape)}, as when the program was compiled, "
                f"but is {dtype}{list(tensor.shape)}"
            )


def ordered(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """`tensor` with its dims in `order` in memory, major to minor, or contiguous if that is empty. A copy only where
    it lies otherwise."""
    if not order:
        return tensor.contiguous()
    back = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(*order).contiguous().permute(back)


def cut(tensor: Tensor, cuts: Cuts, coordinates: Mapping[str, int], axes: Mapping[str, int]) -> Tensor:
    """The part of the global `tensor` that the rank at `coordinates` holds. Contiguous; without cuts not a copy.

    Where a dim does not split evenly, the last parts are padded with zeros. RankError where a dim does not divide by
    the cut's `outer`.
    """
    for dim, outer, split in cuts:
        axis, order = axis_of(split), order_of(split)
        n, size = axes[axis], tensor.shape[dim]
        if size % outer or (order != BLOCKS and size // outer % (2 * n)):
            raise RankError(
                f"dim {dim} of {tuple(tensor.shape)} does not split into {outer} blocks, as axis {split!r} needs"
            )
        if order != BLOCKS:
            blocks = tensor.unflatten(dim, (outer, size // outer))
            tensor = dealt(blocks, dim + 1, order, n, coordinates[axis]).flatten(dim, dim + 1)
            continue
        chunk = -(-size // outer // n)
        blocks = padded(tensor.unflatten(dim, (outer, size // outer)), dim + 1, chunk * n)
        tensor = blocks.narrow(dim + 1, coordinates[axis] * chunk, chunk).flatten(dim, dim + 1)
    return tensor.contiguous()


def padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    """`tensor` with zeros at the end of `dim`, up to `size` elements; `tensor` itself if it has as many."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def paste(parts: Sequence[Tensor], shape: Sequence[int], cuts: Cuts, axes: Mapping[str, int]) -> Tensor:
    """The global tensor of `shape`, without padding, from the local tensors of all ranks, row-major over `axes`.

    Ranks with the same part must hold the same values: `paste` reads the lowest rank's. RankError if the parts do not
    make up `shape`.
    """
    shapes = local_shapes(shape, cuts, axes)
    if tuple(parts[0].shape) != shapes[-1]:
        local = tuple(parts[0].shape)
        raise RankError(f"local parts of shape {local} do not paste to {tuple(shape)}: they must be {shapes[-1]}")

    def build(level: int, coordinates: dict[str, int]) -> Tensor:
        if level == len(cuts):
            rank = 0
            for axis, size in axes.items():
                rank = rank * size + coordinates.get(axis, 0)
            return parts[rank]
        dim, outer, split = cuts[level]
        axis = axis_of(split)
        pieces = [build(level + 1, {**coordinates, axis: index}) for index in range(axes[axis])]
        blocks = [piece.unflatten(dim, (outer, piece.shape[dim] // outer)) for piece in pieces]
        whole = merged(blocks, dim + 1, order_of(split)).narrow(dim + 1, 0, shapes[level][dim] // outer)
        return whole.flatten(dim, dim + 1)

    return build(0, {})


def local_shapes(shape: Sequence[int], cuts: Cuts, axes: Mapping[str, int]) -> list[tuple[int, ...]]:
    """The shape before every cut and, last, the local shape after all cuts, padding included."""
    shapes = [tuple(shape)]
    for dim, outer, axis in cuts:
        local = list(shapes[-1])
        local[dim] = outer * -(-local[dim] // outer // axes[axis_of(axis)])
        shapes.append(tuple(local))
    return shapes


def valid_shape(
    shape: Sequence[int], cuts: Cuts, coordinates: Mapping[str, int], axes: Mapping[str, int]
) -> tuple[int, ...]:
    """The local shape without padding, for cuts that DTensor can store. Such cuts pad a dim only at its end."""
    valid = list(shape)
    for (dim, _, axis), local in zip(cuts, local_shapes(shape, cuts, axes)[1:], strict=True):
        even = valid[dim] % axes[axis] == 0
        rest = valid[dim] // axes[axis] if even else valid[dim] - coordinates[axis] * local[dim]
        valid[dim] = min(max(rest, 0), local[dim])
    return tuple(valid)


def placements(cuts: Cuts, shape: Sequence[int], axes: Mapping[str, int]) -> tuple[Placement, ...]:
    """DTensor placements, one per mesh axis, that store on every rank exactly what `cut` returns.

    DTensor splits in the order of the mesh's axes, so the cuts are brought into that order. A cut `(dim, outer, axis)`
    is `_StridedShard(dim, split_factor=outer)`.

    RankError where a cut of an uneven dim is not its last, where an axis is used twice, where the cuts have no such
    order, or where DTensor could not put the global tensor together again.
    """
    result: dict[str, Placement] = {}
    folded = [axis for _, _, axis in cuts if order_of(axis) != BLOCKS]
    if folded:
        raise RankError(f"DTensor cannot store a dim that is dealt out as {folded[0]}: its shards are blocks")
    if len({axis for _, _, axis in cuts}) < len(cuts):
        raise RankError(f"the cuts {cuts} use an axis twice: each axis may cut a tensor once")
    for dim in {dim for dim, _, _ in cuts}:
        dim_cuts = [(outer, axis) for at, outer, axis in cuts if at == dim and axes[axis] > 1]
        ordered = _in_mesh_order(dim_cuts, dim, shape, axes)
        if not _reassembles(ordered, axes):
            raise RankError(
                f"DTensor stores dim {dim} of {tuple(shape)} cut as {dim_cuts} but would put it together wrongly: "
                "beyond a plain order of axes it allows one cut within blocks per dim, by the last axis that cuts it"
            )
        for outer, axis in ordered:
            result[axis] = Shard(dim) if outer == 1 else _StridedShard(dim, split_factor=outer)
    return tuple(result.get(axis, Replicate()) for axis in axes)


def cuts_of(placements: Sequence[Placement], shape: Sequence[int], axes: Mapping[str, int]) -> Cuts:
    """The inverse of `placements`: cuts in the order of the mesh's axes.

    RankError for Partial, and for a shard of a dim that an earlier axis has split unevenly.
    """
    cuts: list[tuple[int, int, str]] = []
    local, uneven = list(shape), set[int]()
    for (axis, n), placement in zip(axes.items(), placements, strict=True):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, (Shard, _StridedShard)):
            raise RankError(
                f"{placement} on axis {axis!r} does not split the tensor: redistribute it to Shard or Replicate"
            )
        outer = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        dim = placement.dim % len(local) if local else 0
        even = bool(local) and local[dim] % (outer * n) == 0
        if n > 1 and (not local or dim in uneven or not (even or outer == 1)):
            raise RankError(f"dim {dim} of {tuple(shape)} does not split evenly as {placement} on axis {axis!r}")
        uneven |= set() if even else {dim}
        local[dim] = -(-local[dim] // n)
        cuts.append((dim, outer, axis))
    return tuple(cuts)


def _in_mesh_order(
    cuts: list[tuple[int, str]], dim: int, shape: Sequence[int], axes: Mapping[str, int]
) -> list[tuple[int, str]]:
    """The `(outer, axis)` of one dim, in the order of the mesh's axes, that store the same as `cuts`."""
    used = [axis for _, axis in cuts]
    ordered = [axis for axis in axes if axis in used]
    if used == ordered:
        local = shape[dim]
        for outer, axis in cuts:
            uneven_last = outer == 1 and axis == used[-1]
            if local % (outer * axes[axis]) and not uneven_last:
                raise _not_expressible(dim, shape, outer, axis, axes[axis])
            local //= axes[axis]
        return cuts
    factors: list[tuple[int, str | None]] = [(shape[dim], None)]
    for outer, axis in cuts:
        factors = _split(factors, outer, axis, axes[axis], dim, shape)
    names = [name for _, name in factors]
    result: list[tuple[int, str]] = []
    for axis in ordered:
        done = {name for _, name in result}
        before = factors[: names.index(axis)]
        result.append((math.prod(size for size, name in before if name not in done), axis))
    return result


def _reassembles(ordered: list[tuple[int, str]], axes: Mapping[str, int]) -> bool:
    """Whether DTensor can assemble (`full_tensor`, `redistribute`) one dim from these splits, in mesh order.

    Trials over gloo show that it reads `_StridedShard` as an order of the axes. Where the placement stands for outer
    blocks instead, DTensor raises or, with two of them, silently returns wrong values.
    """
    if all(outer == 1 for outer, _ in ordered[:-1]):
        return True
    names = [axis for _, axis in ordered]
    for order in itertools.permutations(names):
        ahead = [set(order[: order.index(axis)]) & set(names[at + 1 :]) for at, axis in enumerate(names)]
        if [math.prod(axes[axis] for axis in before) for before in ahead] == [outer for outer, _ in ordered]:
            return True
    return False


def _not_expressible(dim: int, shape: Sequence[int], outer: int, axis: str, n: int) -> RankError:
    return RankError(
        f"DTensor cannot store dim {dim} of {tuple(shape)} cut by {axis!r} into {n} within {outer} blocks: "
        "the chunks are uneven or overlap those of another axis only in part"
    )


def _split(
    factors: list[tuple[int, str | None]], outer: int, axis: str, n: int, dim: int, shape: Sequence[int]
) -> list[tuple[int, str | None]]:
    """`factors` with one more cut: `(n, axis)` goes where `outer` blocks of the local dim stand before it.

    The product of `factors`, major to minor, is the global dim. Those that carry an axis are not in the local dim.
    """
    result: list[tuple[int, str | None]] = []
    ahead, placed = outer, False
    for size, name in factors:
        if name is not None or placed:
            result.append((size, name))
        elif size % (ahead * n) == 0:
            result += [(ahead, None), (n, axis), (size // (ahead * n), None)]
            placed = True
        elif ahead % size == 0:
            result.append((size, None))
            ahead //= size
        else:
            break
    if not placed:
        raise _not_expressible(dim, shape, outer, axis, n)
    return [(size, name) for size, name in result if size != 1 or name is not None]
