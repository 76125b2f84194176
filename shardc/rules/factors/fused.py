"""Chains of elementwise operators as one kernel: what is handed on within it is neither written nor read in memory.

h = gelu(x);  y = h * g            alone: reads x, h and g, writes h and y, two launches
                                   fused: reads x and g, writes y, one launch
"""

from __future__ import annotations

from typing import NamedTuple


class Fused(NamedTuple):
    """What a kernel does for an operator in it: `reads` are the operands that it reads from memory (None: all). With
    `hands_on`, its results go on to others in the kernel, which launches with the last of them; with `writes`, they
    are written as well."""

    reads: frozenset[int] | None = None
    hands_on: bool = False
    writes: bool = True

    def read(self, operand: int) -> bool:
        """Whether an operand comes from memory."""
        return self.reads is None or operand in self.reads

    @property
    def launches(self) -> int:
        """The kernels that are launched on account of the operator."""
        return 0 if self.hands_on else 1


ALONE = Fused()
"""An operator that is a kernel by itself."""
