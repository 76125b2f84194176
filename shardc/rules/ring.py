"""Rings of operators whose factors are not parted: what goes round while every rank computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ring:
    """What goes round from rank to rank where one axis splits two factors of an operator.

        Ring((("n", "m"), ("n", "k")), operand=0)    of "m k, k n -> m n": parts of operand 0 go round
        Ring((("k", "m"), ("k", "n")))               sums of the result do, each to the rank that keeps it

    In every one of `pairs`, the first factor splits what stays, and the second what goes round, by the last of its
    axes. A tensor with both is split along the first by that axis. The result is complete over it.

    `operand` is the number of the operand that goes round. Without one, addends of the result do.
    """

    pairs: tuple[tuple[str, str], ...]
    operand: int | None = None
