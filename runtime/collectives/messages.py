"""Gloo's messages between two ranks: what carries collectives in which no rank passes on what it got.

    landed = messages.exchange(to, into)     to[1] goes to rank 1, into[1] gets what rank 1 sends, all at once
    landed()                                 waits for all of them

Gloo's own all-gather and reduce-scatter go round a ring, in a thread that wakes up for each of its steps, and copy what
arrives once more. Messages take half of the CPU time, and of the time by the clock (four processes on two cores).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch import Tensor

# torch's own record_function takes as long as sending a few KB
from torch._C._profiler import _RecordFunctionFast as _Profiled  # pyright: ignore

__all__: list[str] = []

EXCHANGE = "shardc::exchange"
"""What torch's profiler calls an exchange."""
_TAGS = 2**30
"""Messages are numbered from here on, in a range that users hardly use for theirs."""


class RankMessages:
    """Messages among the `size` ranks of one group, as the rank at `position`. A message that does not come within
    `timeout` is an error.

    All ranks must make the same exchanges in the same order. They are numbered, so that a rank that left one out gets
    no message of another.
    """

    def __init__(self, backend: Any, size: int, position: int, timeout: timedelta) -> None:
        self._backend = backend
        self._others = [(position + step) % size for step in range(1, size)]
        self._timeout = timeout
        self._numbers = itertools.count()

    def exchange(self, to: Sequence[Tensor], into: Sequence[Tensor]) -> Callable[[], None]:
        """Send `to[i]` to the rank at i, and receive `into[i]` from it; those of this rank itself are left alone.

        Both must be contiguous. Nothing is sent of tensors without elements. The returned function waits for the end.
        Until then nobody may write to `to`, or read `into`.
        """
        tag = _TAGS + next(self._numbers) % _TAGS
        come, go = reversed(self._others), self._others
        with _Profiled(EXCHANGE):
            under_way = [self._backend.recv([into[one]], one, tag) for one in come if into[one].numel()]
            under_way += [self._backend.send([to[one]], one, tag) for one in go if to[one].numel()]

        def landed() -> None:
            for work in under_way:
                work.wait(self._timeout)
            under_way.clear()

        return landed
