"""Experts where a rank holds part `e` of the experts, part `f` of their inner dim, or both.

Shapes are those of `shardc.runtime.kernels.experts`. In `experts_in_parts`, a rank has the tokens of all: the results
are addends, and nothing is sent. In `experts_exchanged`, the ranks that split the experts split the tokens too:

    ids of rank 0: 0 2 | of rank 1: 0 0     ranks tell how many rows go to each expert   (all_to_all)
    rank 0 has experts 0 1: rows a c d      rows go to their experts                     (all_to_all_rows)
    rank 1 has experts 2 3: row b           results go back to their tokens              (all_to_all_rows)

Nothing is dropped, and rows travel once an axis. With `capacity` c, a rank takes at most c times as many rows as its
own tokens have. Where more arrive, it is an error, or those of later ranks and experts count as zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardc.runtime.collectives.all_to_all import all_to_all
from shardc.runtime.collectives.all_to_all_rows import all_to_all_rows
from shardc.runtime.errors import RankError
from shardc.runtime.kernels.experts import Routing, backward_rows, by_token, forward_rows
from shardc.runtime.kernels.grouped import Groups
from shardc.runtime.kernels.parts import Part
from shardc.runtime.mesh.mesh import current

__all__ = [
    "experts_exchanged", "experts_exchanged_backward", "experts_in_parts", "experts_in_parts_backward",
]  # fmt: skip

_Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def experts_in_parts(
    x: Tensor, ids: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    activation: str, slope: str, *, e: Part | None = None, f: Part | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """`shardc::experts`: this rank's addend, of its experts' results for all tokens."""
    routing = _local(ids, e, up.shape[0])
    weights = _filled(up, up_bias, down, down_bias if _first(f) else None, f)
    made = forward_rows(routing.groups, routing.expert, routing.rows(x), *weights, activation)
    return routing.total(made, scores).to(x.dtype)


def experts_in_parts_backward(
    grad: Tensor, x: Tensor, ids: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, slope: str, learns: bool, *, e: Part | None = None,
    f: Part | None = None, **_: Any,
) -> list[Tensor]:  # fmt: skip
    """`shardc::experts_backward`: addends of the gradients of x and scores, and the gradients of its weights."""
    routing = _local(ids, e, up.shape[0])
    weights = _filled(up, up_bias, down, down_bias, f)
    rows = routing.rows(grad), routing.rows(x), routing.entries(scores)
    grads = backward_rows(routing.groups, routing.expert, *rows, *weights, activation, slope, learns, _first(f))
    return by_token(grads, routing, lambda one: one, x, scores)


def experts_exchanged(
    x: Tensor, ids: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    activation: str, slope: str, *, e: Part, f: Part | None = None, capacity: float = 0.0, overflow: str = "error",
    **_: Any,
) -> Tensor:  # fmt: skip
    """`shardc::experts`: the results of this rank's tokens; of a split inner dim, this rank's addend."""
    exchange = _Exchange(ids, e, capacity, overflow)
    weights = _filled(up, up_bias, down, down_bias if _first(f) else None, f)
    made = forward_rows(
        exchange.groups, exchange.expert, exchange.there(exchange.routing.rows(x)), *weights, activation
    )
    return exchange.routing.total(exchange.back(made), scores).to(x.dtype)


def experts_exchanged_backward(
    grad: Tensor, x: Tensor, ids: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, slope: str, learns: bool, *, e: Part, f: Part | None = None,
    capacity: float = 0.0, overflow: str = "error", **_: Any,
) -> list[Tensor]:  # fmt: skip
    """`shardc::experts_backward`: the gradients of this rank's tokens, scores and weights."""
    exchange = _Exchange(ids, e, capacity, overflow)
    weights, routing = _filled(up, up_bias, down, down_bias, f), exchange.routing
    rows = (
        exchange.there(routing.rows(grad)),
        exchange.there(routing.rows(x)),
        exchange.there(routing.entries(scores).unsqueeze(1)).squeeze(1),
    )
    grads = backward_rows(
        exchange.groups, exchange.expert, *rows, *weights, activation, slope, learns, _first(f)
    )  # fmt: skip
    return by_token(grads, routing, exchange.back, x, scores)


class _Exchange:
    """Rows on their way from the ranks that have the tokens to those that have the experts, one hop an axis.

    `routing` are the rows of this rank's tokens. `groups` and `expert` are those of the rows that its experts get.
    """

    def __init__(self, ids: Tensor, part: Part, capacity: float, overflow: str) -> None:
        self.routing = Routing(ids, 0, part.size, every=True)
        limit = math.ceil(capacity * ids.numel()) if capacity else None
        self.hops: list[_Hop] = []
        counts, ways = self.routing.groups.counts, part.count
        for axis in part.axes:
            n = current().size(axis)
            ways //= n
            chunk = -(-len(counts) // n)
            width = ways * part.length  # what the axes after this one can split evenly
            tabled = F.pad(F.pad(counts, (0, n * chunk - len(counts))).view(n, chunk), (0, width - chunk))
            self.hops.append(_Hop(axis, tabled, limit, overflow))
            counts = self.hops[-1].counts[:chunk]
        counts = F.pad(counts, (0, part.length - len(counts)))
        self.groups = Groups(counts)
        self.expert = torch.arange(len(counts), device=ids.device).repeat_interleave(counts)

    def there(self, rows: Tensor) -> Tensor:
        """The rows of this rank's experts, by expert, from the rows of this rank's tokens."""
        for hop in self.hops:
            rows = hop.there(rows)
        return rows

    def back(self, rows: Tensor) -> Tensor:
        """The way back."""
        for hop in reversed(self.hops):
            rows = hop.back(rows)
        return rows


class _Hop:
    """The exchange over one axis. `table` [ranks, experts of a rank] says how many rows this rank has for each."""

    def __init__(self, axis: str, table: Tensor, limit: int | None, overflow: str) -> None:
        self.axis, (n, width) = axis, table.shape
        self.kept: Tensor | None = None
        self.rows = int(table.sum())
        arriving = _told(table, axis)
        if limit is not None:
            table, arriving = self._bounded(table, arriving, limit, overflow)
        self.sent, self.received = table.sum(1).tolist(), arriving.sum(1).tolist()
        self.counts = arriving.sum(0)
        expert = torch.arange(width, device=table.device).repeat(n).repeat_interleave(arriving.flatten())
        self.order = torch.argsort(expert, stable=True)

    def _bounded(self, table: Tensor, arriving: Tensor, limit: int, overflow: str) -> tuple[Tensor, Tensor]:
        """What is sent and what arrives if no rank takes more than `limit` rows."""
        if overflow == "error":
            rows = int(arriving.sum())
            if rows > limit:
                raise RankError(
                    f"{rows} rows come to the experts of this rank over axis {self.axis!r}, and capacity leaves "
                    f"room for {limit}: raise capacity, leave it out (then nothing overflows), or drop what overflows "
                    "(overflow='drop')"
                )
            return table, arriving
        flat = arriving.flatten()
        taken = torch.minimum(flat, (limit - (flat.cumsum(0) - flat)).clamp(min=0)).view_as(arriving)
        granted = _told(taken, self.axis)
        place = torch.arange(self.rows, device=table.device)
        counts = table.flatten()
        within = place - (counts.cumsum(0) - counts).repeat_interleave(counts)
        self.kept = (within < granted.flatten().repeat_interleave(counts)).nonzero().squeeze(1)
        return granted, taken

    def there(self, rows: Tensor) -> Tensor:
        rows = rows if self.kept is None else rows.index_select(0, self.kept)
        rows = all_to_all_rows(rows, axis=self.axis, sent=self.sent, received=self.received)
        return rows.index_select(0, self.order)

    def back(self, rows: Tensor) -> Tensor:
        rows = torch.empty_like(rows).index_copy_(0, self.order, rows)
        rows = all_to_all_rows(rows, axis=self.axis, sent=self.received, received=self.sent)
        return rows if self.kept is None else rows.new_zeros(self.rows, *rows.shape[1:]).index_copy_(0, self.kept, rows)


def _told(table: Tensor, axis: str) -> Tensor:
    """Row i of the table goes to rank i; what arrives, a row a rank."""
    return all_to_all(table.flatten(), split_dim=0, concat_dim=0, axis=axis).view_as(table)


def _local(ids: Tensor, e: Part | None, count: int) -> Routing:
    return Routing(ids, 0, count, every=True) if e is None else Routing(ids, e.start, e.valid, every=False, room=count)


def _first(f: Part | None) -> bool:
    return f is None or f.index == 0


def _filled(up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, f: Part | None) -> _Weights:
    """The weights, with zeros in the padding of the inner dim."""
    if f is None:
        return up, up_bias, down, down_bias
    return f.fill(up, 2, 0), None if up_bias is None else f.fill(up_bias, 2, 0), f.fill(down, 2, 0), down_bias
