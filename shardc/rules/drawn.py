"""Random numbers that an operator draws, as its rule tells them.

draw([32, 512], "normal", 0, 1)                 Drawn((), 32 * 512, itemsize=4)      every rank goes through all
bernoulli(state, [32, 512], 0.9)                Drawn(("d0",), 512, itemsize=1)      it draws the rows that it has
draw_from(seed, [32, 512], "bernoulli", 0.9)    Drawn(("d0", "d1"), stream=False)    it draws its part alone
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Drawn:
    """A rank draws `each` numbers for every local point of `factors`, and writes them to memory in `itemsize` bytes, if
    not zero, before it keeps its part.

    With `stream` they are those of the single device, which the CPU draws. Else the rank's own device draws them from a
    seed, and which they are depends on how the operator is split: operators with one seed are split alike.
    """

    factors: tuple[str, ...]
    each: int = 1
    itemsize: int = 0
    stream: bool = True
