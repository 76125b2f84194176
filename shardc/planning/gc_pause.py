"""Python's cyclic garbage collector, and how to pause it."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Generator[None]:
    """Pause Python's cyclic collector. The compiler makes graphs that grow and stay, and the collector would walk over
    them again and again: half the time of a deep model. At the end, all objects go to the oldest generation without a
    walk."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled and not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        if enabled:
            gc.enable()
