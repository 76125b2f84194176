"""How long and from where the property tests search: SHARDC_FUZZ times as many examples, from the seed SHARDC_SEED."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import Phase, seed, settings

SEED = int(os.environ.get("SHARDC_SEED", "0"))
TIMES = int(os.environ.get("SHARDC_FUZZ", "1"))


def searched(examples: int, shrink: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator above `given`: `examples` from the recorded seed. `shrink=False` where shrinking takes minutes."""
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])]

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        return seed(SEED)(settings(max_examples=examples * TIMES, phases=phases, database=None, deadline=None)(test))

    return decorate
