"""Python's cyclic garbage collector, and how to pause it."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Generator[None]:
    """Pause Python's cyclic collector. The compiler makes graphs that grow and stay, and the collector would walk over
    them again and again: half the time of a deep model. At the end, what was made in the pause is walked over once:
    tracers and graphs that only hold themselves are freed at once, and what stays counts towards the next collection
    of everything, as if there had been no pause."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.collect(1)
            gc.enable()
