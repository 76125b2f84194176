"""What is proved of a plan, and what it takes to pose its problem again: a few numbers that a file can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PLAIN_NETWORK, MEMORY_NETWORK, RECOMPUTE_NETWORK = "plain", "memory", "recompute"


@dataclass(frozen=True)
class Proof:
    """The objective of the choice and the bound that no other beats, in seconds a step. `network` is the kind of
    network that was solved, and `folded_axes` are the axes that it lets fold a sequence. Within a bound on memory, the
    proof rests on `multipliers` of the bytes held at a position, for `capacity` bytes."""

    cost: float
    lower_bound: float
    network: str = PLAIN_NETWORK
    folded_axes: tuple[str, ...] = ()
    capacity: float | None = None
    multipliers: Mapping[int, float] = field(default_factory=dict[int, float])
