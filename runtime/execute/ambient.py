"""What surrounds a call and changes what the model computes: autocast, and the default dtype.

surroundings = Surroundings()     # during the call
with surroundings.again(): ...    # later, say in backward, which runs outside of the user's autocast
with no_autocast(): ...           # while generated code runs, whose casts are written out
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

_KINDS = ("cpu", "cuda")


class Surroundings:
    """The autocast and the default dtype of this thread, when it is made."""

    def __init__(self) -> None:
        self._casts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _KINDS]
        self._dtype = torch.get_default_dtype()

    @contextmanager
    def again(self) -> Generator[None]:
        """Until the end, all is as it was when this was made."""
        before = Surroundings()
        self._set()
        try:
            yield
        finally:
            before._set()

    def _set(self) -> None:
        # torch.autocast switches itself off, and warns, where there is no such device
        for kind, enabled, dtype in self._casts:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.clear_autocast_cache()
        torch.set_default_dtype(self._dtype)


@contextmanager
def no_autocast() -> Generator[None]:
    """Until the end, operators compute in the types of their operands."""
    on = [kind for kind in _KINDS if torch.is_autocast_enabled(kind)]
    try:
        for kind in on:
            torch.set_autocast_enabled(kind, False)
        yield
    finally:
        for kind in on:
            torch.set_autocast_enabled(kind, True)
