"""Plans in which operators with several variants run the one that a test asks for."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from shardc.ir.mesh import Mesh
from shardc.planning import strategies
from shardc.rules.factors.strategy import Shape, Strategy


@contextmanager
def forced(variant: str, among: frozenset[str]) -> Generator[None]:
    """Offer the solver only strategies with `variant` for operators whose rules have just the variants `among`."""
    every = strategies._enumerate

    def offered(shape: Shape, mesh: Mesh) -> Iterator[Strategy]:
        asked = frozenset(one.name for one in shape.variants) == among
        return (one for one in every(shape, mesh) if not asked or one.variant == variant)

    strategies.strategies_of.cache_clear()
    with patch.object(strategies, "_enumerate", offered):
        yield
    strategies.strategies_of.cache_clear()
