"""The record of one step of a conversion in a lowered program."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Conversion:
    """One collective or local slice that the plan emits: a rank sends `sent` bytes over `axis`, in `seconds`. `name` is
    that of the node in `graph("reshard")`, `value` that of the value it converts, `place` a line of the user's code."""

    kind: str
    axis: str
    name: str
    sent: float
    seconds: float
    phase: str
    place: str
    value: str = ""
    cause: str = ""
    """What is converted from which layout to which, and for whom. Not told of prices."""
