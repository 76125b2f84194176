"""The batches that a search tries: one, a range, or as large a one as still pays."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shardc.errors import ShardcError
from shardc.ir.model_call import ModelCall
from shardc.options import AUTO, batch_range

MOST = 2**20
"""Rows of the largest batch that is tried where no range ends it."""


@dataclass(frozen=True)
class Batches:
    """`now` are the rows that are tried first, and `most` the rows of the largest batch. `first` is None where the
    inputs have so many rows as they come."""

    now: int
    most: int
    first: int | None = None

    @staticmethod
    def of(call: ModelCall, asked: int | str | None) -> Batches:
        """The batches that were asked for, with the inputs of a call. Raises ShardcError for inputs without rows."""
        rows = call.rows
        if asked is None:
            return Batches(rows, rows)
        if not rows:
            raise ShardcError(f"batch={asked!r}: no input of the model is a tensor with dims, so there is no batch")
        low, high = (rows, MOST) if asked == AUTO else batch_range(asked)
        return Batches(low, high, None if low == rows else low)

    def larger(self) -> Iterator[int]:
        """The batches behind the first, each twice the one before."""
        rows = self.now
        while rows and rows < self.most:
            rows = min(2 * rows, self.most)
            yield rows


@contextmanager
def resized(rows: int | None) -> Generator[None]:
    """Errors of a call that was given other rows say so. `rows` None: those of the call."""
    try:
        yield
    except ShardcError as error:
        if rows is None:
            raise
        told = f"with batch={rows} in dim 0 of every input that has as many rows as the first tensor"
        raise ShardcError(f"{told}: {error}") from error
