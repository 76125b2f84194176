"""Liveness: after which line of a function nothing reads a value any more.

0  y = mm(x, w)     touches x, w, y
1  z = relu(y)      touches y, z        dead_after([[x, w, y], [y, z]], kept=[w, z])  ->  {0: [x], 1: [y]}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx


def dead_after(touched: Iterable[Sequence[fx.Node]], kept: Iterable[fx.Node | None]) -> dict[int, list[fx.Node]]:
    """Per line of a function, by its position, the values that are dead after it, but for those that are `kept`.

    `touched` lists for every line what it reads and what it makes. A value that no line reads is dead after the line
    that makes it.
    """
    last = {value: line for line, values in enumerate(touched) for value in values}
    dead: dict[int, list[fx.Node]] = {}
    stays = set(kept)
    for value, line in last.items():
        if value not in stays:
            dead.setdefault(line, []).append(value)
    return dead
