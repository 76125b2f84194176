"""A mask as a function of a few numbers of each query and each key, so that no tensor of all pairs exists.

documents of packed sequences     eq(q0, k0)
and their padding                 bitwise_and(eq(q0, k0), ne(k1, 0))
a prefix that all see             bitwise_or(le(k0, q0), lt(k0, q1))

It is evaluated tile by tile. A tile in which no query sees a key is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardc.runtime.kernels.attention.pieces import Piece
from shardc.runtime.kernels.mixture.formulas import formula

__all__: list[str] = []


@dataclass(frozen=True)
class MaskFunction:
    """`sees` is a formula of q0, q1, ... and k0, k1, ..., the rows of `of_queries` `[n, batch or 1, queries]` and
    `of_keys` `[m, batch or 1, keys]`. What `mask`, of five dims as in blocks.py, masks besides is masked as well."""

    of_queries: Tensor
    of_keys: Tensor
    sees: str
    mask: Tensor | None

    def seen(self, piece: Piece) -> Tensor:
        """Whether each query of a piece sees each key by the formula: `[batch or 1, 1, 1, rows, columns]`."""
        rows = piece.sums(self.of_queries)[:, :, None, None, :, None]
        columns = self.of_keys[..., piece.column : piece.column + piece.columns][:, :, None, None, None, :]
        names = [*(f"q{i}" for i in range(len(rows))), *(f"k{i}" for i in range(len(columns)))]
        return formula(self.sees, *names)(*rows.unbind(), *columns.unbind())

    def at(self, piece: Piece) -> Tensor:
        """The mask of a piece."""
        seen = self.seen(piece)
        if self.mask is None:
            return seen
        given = piece.pairs(self.mask)
        return given & seen if given.dtype == torch.bool else torch.where(seen, given, float("-inf"))

    def empty(self, piece: Piece) -> bool:
        """Whether no query of a piece sees a key."""
        return not bool(self.seen(piece).any())

    @property
    def batch(self) -> int:
        """How many elements of the batch have masks of their own."""
        return max(self.of_queries.shape[1], self.of_keys.shape[1], 1 if self.mask is None else self.mask.shape[0])

    def of(self, batch: slice, mask: Tensor | None) -> MaskFunction:
        """That of a part of the batch, with its part of the mask."""
        own = (x if x.shape[1] == 1 else x[:, batch] for x in (self.of_queries, self.of_keys))
        return replace(self, of_queries=next(own), of_keys=next(own), mask=mask)


Mask = Tensor | MaskFunction


def pairs(piece: Piece, mask: Mask) -> Tensor:
    """The mask of a piece."""
    return mask.at(piece) if isinstance(mask, MaskFunction) else piece.pairs(mask)
