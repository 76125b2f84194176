"""Python's cyclic collector, and when it has nothing to do."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Generator[None]:
    """Python's cyclic collector pauses: graphs grow and stay, so it would walk over them again and again for nothing,
    which is half the time of a deep model. What was made goes to the oldest generation, without one last walk."""
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
