"""Small Python objects, exchanged between ranks over a group of their own: the default group belongs to the step."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from shardc.runtime.errors import RankError
from shardc.runtime.mesh.agreement import board, others

Value = TypeVar("Value")

_groups: list[tuple[Any, Any]] = []
"""The default group, and the group for objects that was made beside it."""


def own_rank() -> tuple[int, int]:
    """The number of this process and how many there are; `(0, 1)` without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def object_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks, with the timeout of the default group; None without torch.distributed. At its first
    call every rank must call it."""
    if not dist.is_initialized():
        return None
    world = dist.group.WORLD
    if not _groups or _groups[0][0] is not world:
        timeout = timedelta(seconds=board().patience)
        _groups[:] = [(world, dist.new_group(backend="gloo", timeout=timeout))]
    return _groups[0][1]


def from_all(value: Value, what: str) -> list[Value]:
    """What every rank brings, in the order of ranks. Every rank must call it.

    RankError within the timeout of the default group where a rank does not; `what` says in it what was exchanged.
    """
    group = object_group()
    if group is None:
        return [value]
    brought: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(brought, value, group)
    except Exception as error:
        told = others()
        known = f"\n  the other ranks, as far as is known: {told}" if told else ""
        rank = dist.get_rank()
        raise RankError(f"rank {rank} failed to exchange {what}: {error}{known}", rank=rank) from error
    return brought
