"""What a lowered program sends, and the local steps of its conversions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Conversion:
    """One collective or local slice that the plan emits: `sent` bytes a rank over `axis`, in `seconds`. `name` is its
    own in `graph("reshard")`, `value` that of the value it converts."""

    kind: str
    axis: str
    name: str
    sent: float
    seconds: float
    phase: str
    place: str
    value: str = ""
