"""Extrapolated sweeps: a change that repeats from sweep to sweep is made many times over at once.

In a deep network a sweep is slow to settle what two far ends hand each other: for tens of sweeps each changes the
messages by about what the last one did, or by a fixed part of that.

Messages prove a bound whatever they are (`certificate.py`). So after two sweeps the change that they made is made
again, `factor` times over. If the sweep that follows is worth more than one without this, the extrapolation stands and
the next one is longer; else it is undone.

    bound after sweeps 1.0, 1.1; 4 changes more, and a sweep: 1.5 > 1.1 + 0.1, so they stand, and 8 are next

Where there are triplets, loans move as well, and messages alone do not get far: nothing is extrapolated then.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardc.solver import tuning
from shardc.solver.bounds.bound import Bound
from shardc.solver.problem import Array


@dataclass(frozen=True)
class _Messages:
    """The messages of a bound without triplets. Arrays are replaced by sweeps, never changed."""

    to_first: list[Array]
    to_second: list[Array]
    lower: float

    @staticmethod
    def of(bound: Bound) -> _Messages:
        return _Messages(list(bound.to_first), list(bound.to_second), bound.lower)

    def restore(self, bound: Bound) -> None:
        bound.to_first, bound.to_second, bound.lower = self.to_first, self.to_second, self.lower


class Extrapolation:
    """Rounds of sweeps; it remembers how far the last extrapolation could go."""

    SWEEPS = 3
    """Sweeps of a round."""

    def __init__(self) -> None:
        self.factor = tuning.EXTRAPOLATION_LEAST

    def round(self, bound: Bound) -> float:
        """Two sweeps, and one more after an extrapolation; returns the bound, which does not fall."""
        before = _Messages.of(bound)
        first = bound.sweep()
        lower = bound.sweep()
        if bound.triplets:
            return bound.sweep()
        now = _Messages.of(bound)
        pairs = zip(before.to_first, now.to_first, strict=True)
        bound.to_first = [new + self.factor * (new - old) for old, new in pairs]
        further = bound.sweep()
        if further > lower + (lower - first):
            self.factor = min(self.factor * tuning.EXTRAPOLATION_GROWTH, tuning.EXTRAPOLATION_MOST)
            return further
        now.restore(bound)
        self.factor = max(self.factor * tuning.EXTRAPOLATION_SHRINK, tuning.EXTRAPOLATION_LEAST)
        return lower
