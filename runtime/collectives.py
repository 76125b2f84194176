"""The collectives of generated code. Each finds the running rank by itself, so the code is the same on every rank.

`dim` is a tensor's dim, `axis` a mesh axis with n ranks. All results are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardc.runtime.errors import RankError
from shardc.runtime.mesh import current

_OPS = ("sum", "max", "min", "prod")


def all_gather(x: Tensor, *, dim: int, axis: str) -> Tensor:
    """The chunks of all ranks side by side: dim grows n times."""
    context = current()
    if context.size(axis) == 1:
        return x.contiguous()
    _check_dim(x, dim)
    parts = context.collective("all_gather", axis, x)
    return parts.flatten(0, 1) if dim == 0 else torch.cat(parts.unbind(0), dim)


def reduce_scatter(x: Tensor, *, dim: int, axis: str, op: str = "sum") -> Tensor:
    """The reduction over the ranks, of which every rank keeps its own chunk: dim shrinks n times."""
    context = current()
    n = context.size(axis)
    _check_op(op)
    if n == 1:
        return x.contiguous()
    return context.collective("reduce_scatter", axis, _chunks(x, dim, n), op)


def all_reduce(x: Tensor, *, axis: str, op: str = "sum") -> Tensor:
    """The reduction over the ranks, whole on every rank."""
    context = current()
    _check_op(op)
    if context.size(axis) == 1:
        return x.contiguous()
    return context.collective("all_reduce", axis, x, op)


def all_to_all(x: Tensor, *, split_dim: int, concat_dim: int, axis: str) -> Tensor:
    """Moves a split from `concat_dim` to `split_dim`: `split_dim` shrinks n times, `concat_dim` grows n times."""
    context = current()
    n = context.size(axis)
    if n == 1:
        return x.contiguous()
    _check_dim(x, concat_dim)
    parts = context.collective("all_to_all", axis, _chunks(x, split_dim, n))
    return torch.cat(parts.unbind(0), concat_dim)


def shard(x: Tensor, *, dim: int, axis: str) -> Tensor:
    """This rank's chunk of an even split of dim. Local: nothing is sent."""
    context = current()
    n = context.size(axis)
    _check_even(x, dim, n)
    return x.chunk(n, dim)[context.coordinates[axis]].contiguous() if x.shape[dim] else x.contiguous()


def to_partial(x: Tensor, *, axis: str, op: str = "sum") -> Tensor:
    """A value that is whole on every rank, as one that an all-reduce with `op` would bring back. Local.

    sum and prod: the value on the first rank, the identity on the others. max and min: the value itself, everywhere.
    """
    context = current()
    context.size(axis)
    _check_op(op)
    if op in ("max", "min") or context.coordinates[axis] == 0:
        return x.contiguous()
    fill = torch.zeros_like if op == "sum" else torch.ones_like
    return fill(x, memory_format=torch.contiguous_format)


def _check_op(op: str) -> None:
    if op not in _OPS:
        raise RankError(f"no reduction {op!r}: one of {', '.join(_OPS)}")


def _check_dim(x: Tensor, dim: int) -> None:
    if not 0 <= dim < x.dim():
        raise RankError(f"dim {dim} is not a dim of a tensor of shape {tuple(x.shape)}")


def _check_even(x: Tensor, dim: int, n: int) -> None:
    _check_dim(x, dim)
    if x.shape[dim] % n:
        raise RankError(f"dim {dim} of shape {tuple(x.shape)} does not split evenly into {n} chunks")


def _chunks(x: Tensor, dim: int, n: int) -> Tensor:
    """`(n, *chunk)`: the n chunks of dim, stacked."""
    _check_even(x, dim, n)
    return x.unflatten(dim, (n, x.shape[dim] // n)).movedim(dim, 0)
