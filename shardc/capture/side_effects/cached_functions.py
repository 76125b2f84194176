"""Functions with `functools.lru_cache` in a trace: what they remember is not to be of the trace.

@lru_cache
def causal(n): return torch.ones(n, n).tril()    # runs at every call; the cache stays as it is
def scale(n): return n ** -0.5                   # a plain value: from the cache, as ever
def seen(n): shapes.append(n)                    # CaptureError: it would run once, and a trace takes it back
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from shardc.capture.side_effects.code import changes_something, makes_tensors
from shardc.capture.side_effects.holders import Holder, Location
from shardc.capture.side_effects.snapshot import Snapshot
from shardc.capture.user_frames import at_line
from shardc.errors import CaptureError

Telling = Callable[[], AbstractContextManager[None]]


def uncache(cached: Iterable[tuple[Location, Any]], holders: Iterable[Holder], told_once: Telling) -> None:
    """Put functions in the places of the `cached` ones for a trace. What these tell the user they tell within
    `told_once`; what they change is looked for in the `holders`."""
    for place, function in cached:
        bare = function.__wrapped__
        if makes_tensors(bare):
            place.set(bare)
        else:
            place.set(_watched(function, list(holders) if changes_something(bare) else [], told_once))


def _watched(function: Any, holders: list[Holder], told_once: Telling) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with told_once():
            if holders:
                before = Snapshot(holders)
                function.__wrapped__(*args, **kwargs)  # nothing is remembered if it is refused
                changes = before.restore()
                if changes:
                    line = at_line(sys._getframe(1))
                    raise CaptureError(
                        f"forward calls {function.__qualname__}{line}, which changes {', '.join(changes[0].names())} "
                        "and runs once only, because functools.lru_cache remembers its result. A trace may run it "
                        "several times: change things outside of it"
                    )
            return function(*args, **kwargs)

    call.cache_info, call.cache_clear = function.cache_info, function.cache_clear  # type: ignore[attr-defined]
    return call
