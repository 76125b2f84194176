"""Rows on their way between the ranks that have tokens and those that have experts, one hop for each axis.

    ids of rank 0: 0 2 | of rank 1: 0 0    every rank tells all how many rows it has for each expert   all_gather
    rank 0 has experts 0 1: rows a c d     rows go to their experts                                    all_to_all_rows
    rank 1 has experts 2 3: row b          results go back to their tokens                             all_to_all_rows

All ranks know the sizes of all, so that they agree on what overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardc.runtime.collectives.all_to_all_rows import all_to_all_rows
from shardc.runtime.errors import RankError
from shardc.runtime.kernels.mixture.fused import Routing
from shardc.runtime.kernels.mixture.grouped import RowGroups
from shardc.runtime.kernels.parts import Part
from shardc.runtime.mesh.mesh import current

__all__: list[str] = []


class RowExchange:
    """`routing` are the rows of this rank's tokens. `groups` and `expert` are those of the rows that its experts get,
    and `most` is the most rows that any rank's experts get.

    Experts lie as `part` says. If `limit` is not None, rows past it that come to one rank are dropped: those of later
    ranks and experts.
    """

    def __init__(self, ids: Tensor, part: Part, limit: int | None = None) -> None:
        self.routing = Routing(ids, 0, part.size, every=True)
        ranks, length = part.count, part.length
        own = torch.zeros(ranks * length, dtype=torch.int64, device=ids.device)
        own[_places(part).to(ids.device)] = self.routing.groups.counts
        table = part.gather(own.unsqueeze(0), 0).cpu().view(ranks, ranks, length)  # rows, by source, rank and expert
        self.most = int(table.sum((0, 2)).max())
        self._kept: Tensor | None = None
        if limit is not None and self.most > limit:
            table, full = _within(table, limit), table
            self._kept = _kept(full[part.index].flatten(), table[part.index].flatten()).to(ids.device)
        self._table, self._part, self._device = table, part, ids.device
        self._hops: list[_Hop] = []

    def _open(self) -> None:
        """Plan the hops, once it is decided that rows travel."""
        axes = self._part.axes
        sizes = [current().size(axis) for axis in axes]
        here = [current().coordinates[axis] for axis in axes]
        table = self._table.view(*sizes, *sizes, -1)  # by coordinates of the source, coordinates of the rank, expert
        for place, axis in enumerate(axes):
            rest = table[(slice(None), *here[place + 1 :])].flatten(2)  # sources and ranks along the axis
            self._hops.append(_Hop(axis, rest, here[place], self._device))
            # what came over this axis is the rank's own from here on
            table = table.sum(0).select(len(axes) - place - 1, here[place])
        self._counts = table.to(self._device)

    @property
    def groups(self) -> RowGroups:
        """The rows of this rank's experts."""
        self._ready()
        return RowGroups(self._counts)

    @property
    def expert(self) -> Tensor:
        """The expert of each of these rows."""
        self._ready()
        return torch.arange(len(self._counts), device=self._device).repeat_interleave(self._counts)

    def _ready(self) -> None:
        if not self._hops:
            self._open()

    def there(self, rows: Tensor) -> Tensor:
        """The rows of this rank's experts, by expert, from the rows of its tokens."""
        self._ready()
        rows = rows if self._kept is None else rows.index_select(0, self._kept)
        for hop in self._hops:
            rows = hop.there(rows)
        return rows

    def back(self, rows: Tensor) -> Tensor:
        """The way back. What was dropped is zero."""
        for hop in reversed(self._hops):
            rows = hop.back(rows)
        if self._kept is None:
            return rows
        return rows.new_zeros(len(self.routing.order), *rows.shape[1:]).index_copy_(0, self._kept, rows)

    def refuse_overflow(self, limit: int) -> None:
        """RankError, on all ranks alike, if more than `limit` rows come to one of them."""
        if self.most > limit:
            raise RankError(
                f"{self.most} rows come to the experts of one rank over {', '.join(self._part.axes)}, and capacity "
                f"leaves room for {limit}: raise capacity, or ask for overflow='rounds' (rows then travel in several "
                "rounds) or 'drop' (these experts then count as zero for their tokens)"
            )


class _Hop:
    """The exchange over one axis. `table` [ranks, ranks, experts] has the rows by source, rank and expert."""

    def __init__(self, axis: str, table: Tensor, here: int, device: torch.device) -> None:
        self.axis = axis
        self.sent: list[int] = table[here].sum(1).tolist()
        self.received: list[int] = table[:, here].sum(1).tolist()
        arriving = table[:, here].to(device)
        ranks, experts = arriving.shape
        expert = torch.arange(experts, device=device).repeat(ranks).repeat_interleave(arriving.flatten())
        self.order = torch.argsort(expert, stable=True)

    def there(self, rows: Tensor) -> Tensor:
        rows = all_to_all_rows(rows, axis=self.axis, sent=self.sent, received=self.received)
        return rows.index_select(0, self.order)

    def back(self, rows: Tensor) -> Tensor:
        rows = torch.empty_like(rows).index_copy_(0, self.order, rows)
        return all_to_all_rows(rows, axis=self.axis, sent=self.received, received=self.sent)


def _places(part: Part) -> Tensor:
    """For each expert, its rank times the experts of a rank, plus its place there."""
    return torch.cat([rank * part.length + torch.arange(valid) for rank, (_, valid) in enumerate(part.spans)])


def _within(table: Tensor, limit: int) -> Tensor:
    """The table without the rows past `limit` of any rank: those of earlier sources and experts stay."""
    by_rank = table.transpose(0, 1).flatten(1)
    before = by_rank.cumsum(1) - by_rank
    return torch.minimum(by_rank, (limit - before).clamp(min=0)).unflatten(1, table.shape[::2]).transpose(0, 1)


def _kept(counts: Tensor, taken: Tensor) -> Tensor:
    """The rows that stay if of the `counts` rows of each expert the first `taken` do."""
    within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return (within < taken.repeat_interleave(counts)).nonzero().squeeze(1)
