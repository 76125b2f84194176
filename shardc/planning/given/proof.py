"""What is proved of a plan, and what it takes to pose its problem again: a few numbers that a file can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardc.planning.compilation import Compilation
from shardc.planning.recompute_network import RecomputeNetwork

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


def proof_of(c: Compilation, cost: float, lower_bound: float) -> Proof:
    """The proof of a compilation."""
    network, relaxed = PLAIN_NETWORK, None if c.solution is None else c.solution.relaxation
    if isinstance(c.network, RecomputeNetwork):
        network = RECOMPUTE_NETWORK if c.network.recompute else MEMORY_NETWORK
    axes = {axis for value in c.factored.base.values() for folds in value.form.folds for axis in folds}
    if relaxed is None:
        return Proof(cost, lower_bound, network, tuple(sorted(axes)))
    multipliers = {int(position): float(value) for position, value in relaxed.multipliers.items()}
    return Proof(cost, lower_bound, network, tuple(sorted(axes)), float(relaxed.capacity), multipliers)
