"""Small Python objects, exchanged between ranks over a group of their own: the default group belongs to the step."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from shardc.runtime.mesh.agreement import board, meeting

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
        with meeting("making a process group"):
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
    with meeting(f"the exchange of {what}"):
        dist.all_gather_object(brought, value, group)
    return brought
