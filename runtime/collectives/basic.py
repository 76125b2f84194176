"""The collectives of generated code. Each finds the running rank by itself, so the code is the same on every rank.

`dim` is a tensor's dim, `axis` a mesh axis with n ranks. All results are contiguous. Each may be called or started
(`shardc/runtime/collectives/started.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardc.runtime.collectives.started import Collective, Started, done
from shardc.runtime.errors import RankError
from shardc.runtime.execute.slots import padded
from shardc.runtime.mesh.mesh import current

_OPS = ("sum", "max", "min", "prod")


@Collective
def all_gather(x: Tensor, *, dim: int, axis: str, size: int | None = None) -> Started[Tensor]:
    """The chunks of all ranks side by side: dim grows n times, less the padding beyond its `size`."""
    context = current()
    if context.size(axis) == 1:
        return done(x.contiguous())
    _check_dim(x, dim)
    return context.start("all_gather", axis, x, lambda parts: _joined(parts, dim, size))


@Collective
def reduce_scatter(x: Tensor, *, dim: int, axis: str, op: str = "sum", chunk: int | None = None) -> Started[Tensor]:
    """The reduction over the ranks, of which every rank keeps its own chunk: dim shrinks n times, or to `chunk`."""
    context = current()
    n = context.size(axis)
    check_op(op)
    if n == 1:
        return done(x.contiguous())
    return context.start("reduce_scatter", axis, chunks(x, dim, n, chunk), op=op)


@Collective
def all_reduce(x: Tensor, *, axis: str, op: str = "sum") -> Started[Tensor]:
    """The reduction over the ranks, whole on every rank."""
    context = current()
    check_op(op)
    if context.size(axis) == 1:
        return done(x.contiguous())
    return context.start("all_reduce", axis, x, op=op)


@Collective
def all_to_all(
    x: Tensor, *, split_dim: int, concat_dim: int, axis: str, chunk: int | None = None, size: int | None = None
) -> Started[Tensor]:
    """Moves a split from `concat_dim` to `split_dim`: `split_dim` shrinks n times (or to `chunk`), `concat_dim` grows n
    times (less the padding beyond `size`)."""
    context = current()
    n = context.size(axis)
    if n == 1:
        return done(x.contiguous())
    _check_dim(x, concat_dim)
    parts = chunks(x, split_dim, n, chunk)
    return context.start("all_to_all", axis, parts, lambda found: _joined(found, concat_dim, size))


@Collective
def permute(x: Tensor, *, axis: str, sources: Sequence[int]) -> Started[Tensor]:
    """The operand of the rank whose coordinate is `sources[own coordinate]`; `sources` has every coordinate once."""
    context = current()
    n = context.size(axis)
    if sorted(sources) != list(range(n)):
        raise RankError(f"sources {list(sources)} are not the {n} coordinates of axis {axis!r} in some order")
    if n == 1:
        return done(x.contiguous())
    return context.start("permute", axis, x, op=" ".join(map(str, sources)))


def shard(x: Tensor, *, dim: int, axis: str, chunk: int | None = None) -> Tensor:
    """This rank's chunk of dim: an even part, or `chunk` elements, the last ones padded. Local: nothing is sent."""
    context = current()
    n = context.size(axis)
    _check_dim(x, dim)
    if n == 1 and chunk is None:
        return x.contiguous()
    # a copy even of what is contiguous: a view would keep the whole of x in memory
    return chunks(x, dim, n, chunk)[context.coordinates[axis]].clone(memory_format=torch.contiguous_format)


def to_partial(x: Tensor, *, axis: str, op: str = "sum") -> Tensor:
    """A value that is whole on every rank, as one that an all-reduce with `op` would bring back. Local.

    sum and prod: the value on the first rank, the identity on the others. max and min: the value itself, everywhere.
    """
    context = current()
    context.size(axis)
    check_op(op)
    if op in ("max", "min") or context.coordinates[axis] == 0:
        return x.contiguous()
    fill = torch.zeros_like if op == "sum" else torch.ones_like
    return fill(x, memory_format=torch.contiguous_format)


def check_op(op: str) -> None:
    """RankError for a reduction that there is none of."""
    if op not in _OPS:
        raise RankError(f"no reduction {op!r}: one of {', '.join(_OPS)}")


def _check_dim(x: Tensor, dim: int) -> None:
    if not 0 <= dim < x.dim():
        raise RankError(f"dim {dim} is not a dim of a tensor of shape {tuple(x.shape)}")


def chunks(x: Tensor, dim: int, n: int, chunk: int | None) -> Tensor:
    """`(n, *chunk)`: the n chunks of dim, stacked."""
    _check_dim(x, dim)
    if chunk is not None:
        x = padded(x, dim, n * chunk)
    if x.shape[dim] % n:
        raise RankError(f"dim {dim} of shape {tuple(x.shape)} does not split evenly into {n} chunks")
    return x.unflatten(dim, (n, x.shape[dim] // n)).movedim(dim, 0)


def _joined(parts: Tensor, dim: int, size: int | None) -> Tensor:
    """The chunks of `(n, *chunk)` side by side along `dim`, up to `size`."""
    whole = parts.flatten(0, 1) if dim == 0 else torch.cat(parts.unbind(0), dim)
    return whole if size is None else whole.narrow(dim, 0, size).contiguous()
