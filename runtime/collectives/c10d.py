"""The transports of collectives over torch.distributed: torch's functional collectives, or messages over gloo.

Gloo does not know all dtypes. Functional collectives move those as bytes, and reduce them in a wider type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardc.runtime.collectives.messages import RankMessages
from shardc.runtime.collectives.reductions import REDUCTIONS, reduced
from shardc.runtime.errors import RankError

__all__: list[str] = []

OPS: Any = torch.ops._c10d_functional  # pyright: ignore[reportPrivateUsage]
# Gloo moves and reduces only these.
_GLOO = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8,
    torch.bool,
)  # fmt: skip
FEW = 2**16
"""Bytes of an all-reduce, in all that a rank gets, up to which gloo's is not worth its steps."""
_WIDER = {torch.int16: torch.int32, torch.float8_e4m3fn: torch.float32, torch.float8_e5m2: torch.float32}


class Group(NamedTuple):
    """The ranks of one axis as torch knows them: the group's name and `size`, and this process's `position` in it.

    `cpu` says that its tensors lie on the CPU. Then gloo runs its collectives, and `messages` between its ranks there.
    `shared` says that several of its ranks, but not all, share the link of a host: then a ring sends less over that
    link than messages to every rank do.
    """

    name: str
    size: int
    position: int
    cpu: bool
    messages: RankMessages | None
    shared: bool = False

    @property
    def direct(self) -> RankMessages | None:
        """The messages, where those from every rank to every other are no more than a ring's over any link."""
        return None if self.shared else self.messages

    def carries(self, dtype: torch.dtype) -> bool:
        """Whether the backend moves and reduces tensors of `dtype`."""
        return not self.cpu or dtype in _GLOO


def gathered(operand: Tensor, group: Group) -> Callable[[], Tensor]:
    """`(n, *shape)`: the operands of all ranks, as a function that waits for them."""
    if group.direct is None:
        rows = operand.unsqueeze(0)
        return _moved(rows, group, lambda rows: OPS.all_gather_into_tensor(rows, group.size, group.name))
    result = operand.new_empty(group.size, *operand.shape)
    into = result.unbind(0)
    landed = group.direct.exchange([operand] * group.size, into)
    into[group.position].copy_(operand)

    def arrived() -> Tensor:
        landed()
        return result

    return arrived


def exchanged(rows: Tensor, received: Sequence[int], sent: Sequence[int], group: Group) -> Callable[[], Tensor]:
    """The rows that this rank gets, in the order of the ranks, as a function that waits for them.

    `rows` has those for rank 0 first; `sent` and `received` say how many go to each rank, and come from it.
    """
    if group.messages is None:
        return _moved(rows, group, lambda rows: OPS.all_to_all_single(rows, received, sent, group.name))
    result = rows.new_empty(sum(received), *rows.shape[1:])
    to, into = rows.split(list(sent)), result.split(list(received))
    landed = group.messages.exchange(to, into)
    into[group.position].copy_(to[group.position])

    def arrived() -> Tensor:
        landed()
        return result

    return arrived


def scattered(rows: Tensor, group: Group, op: str, in_place: bool = False) -> Callable[[], Tensor]:
    """The reduction of this rank's row over the ranks, from `(n, *chunk)`, as a function that waits for it. With
    `in_place` it may write to the rows.

    Over messages, the rank reduces in the order of the ranks once all has come. Gloo's own is an all-reduce.
    """
    if group.direct is None and group.cpu:
        reduced_rows = all_reduced(rows, group, op, in_place)
        return lambda: reduced_rows()[group.position].clone()
    dtype, rows = rows.dtype, _reducible(rows, group)
    if group.direct is None:
        reducing = OPS.reduce_scatter_tensor(rows, REDUCTIONS[op][1], group.size, group.name)
        return lambda: _landed(reducing).to(dtype).squeeze(0)
    to = rows.unbind(0)
    own = to[group.position]
    into = [own if rank == group.position else torch.empty_like(own) for rank in range(group.size)]
    landed = group.direct.exchange(to, into)

    def arrived() -> Tensor:
        landed()
        return reduced(into, op).to(dtype)

    return arrived


def all_reduced(operand: Tensor, group: Group, op: str, in_place: bool = False) -> Callable[[], Tensor]:
    """The reduction of the operands of all ranks, as a function that waits for it; `in_place` in the operand's memory.

    Where that is a few KB, each rank sends them to every other, and reduces what comes in the order of the ranks: a
    ring takes twice as many steps. It sends a copy, since an all-reduce need not hold its operand.
    """
    dtype, copied = operand.dtype, not group.carries(operand.dtype)
    operand = _reducible(operand, group)
    if group.messages is None or operand.numel() * operand.element_size() * group.size > FEW:
        reduce = OPS.all_reduce_ if in_place else OPS.all_reduce
        reducing = reduce(operand, REDUCTIONS[op][1], group.name)
        return lambda: _landed(reducing).to(dtype)
    own = operand if in_place or copied else operand.clone()
    into = [own if rank == group.position else torch.empty_like(own) for rank in range(group.size)]
    landed = group.messages.exchange([own] * group.size, into)

    def arrived() -> Tensor:
        landed()
        return reduced(into, op).to(dtype)

    return arrived


def _reducible(operand: Tensor, group: Group) -> Tensor:
    """The operand in a type that the backend reduces. RankError where there is none that is wide enough."""
    dtype = operand.dtype
    if group.carries(dtype):
        return operand
    if dtype not in _WIDER:
        raise RankError(f"gloo does not reduce tensors of {dtype}: cast the tensor, or run on CUDA devices")
    return operand.to(_WIDER[dtype])


def _moved(rows: Tensor, group: Group, move: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """The result of `move` on `rows`, as a function that waits for it.

    `rows` are sent as bytes where the backend does not know their dtype. They have at least one dim, since a tensor
    without dims has no view as bytes.
    """
    dtype = rows.dtype
    if group.carries(dtype):
        moving = move(rows)
        return lambda: _landed(moving)
    moving = move(rows.unsqueeze(-1).view(torch.uint8))
    return lambda: _landed(moving).view(dtype).squeeze(-1)


def _landed(moving: Tensor) -> Tensor:
    """Wait for a functional collective; its result."""
    return OPS.wait_tensor(moving)
