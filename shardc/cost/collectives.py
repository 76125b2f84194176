"""Collectives: the seconds that each algorithm of a backend takes on one mesh axis.

Every algorithm is a line over the bytes B of the local operand: `seconds = latency + B · per_byte`. The hardware file
lists algorithms for each collective, and the model assumes that the backend runs the fastest of them.

The axis has n ranks, `near` of them in each of `nodes` nodes (n = near · nodes). α and β are the latency (seconds a
hop) and the bandwidth (bytes a second) inside a node. α' and β' are those between nodes, where β' is the uplink of a
node divided by the number of rings that share it. β* is the slower of the links in use:

    once round (P)      (n-nodes)α + (nodes-1)α' + (n-1)·chunk/β*       a chunk passes nodes-1 hops between nodes
    all_gather          ring          P(B)
                        direct        max(α, α') + max((near-1)·B/β, (n-near)·near·B/β')
                        hierarchical  across nodes P(B), every device its own ring; then inside P(nodes·B)
    reduce_scatter      ring          P(B/n)
                        hierarchical  inside P(B/near); then across nodes P(B/n)
                        all_reduce    the ring of an all-reduce; each rank then keeps its chunk
    all_reduce          ring          2 P(B/n)
                        tree          2((near-1)α + ⌈log2 nodes⌉α') + 2·B/β*
                        star          2·max(α, α') + 2(n-1)·B/β*
                        direct        as the all-gather
                        hierarchical  inside 2 P(B/near); between, a ring or tree of B/near for every device
    all_to_all          pairwise      (near-1)α + (n-near)α' + max((near-1)/n·B/β, (n-near)/n·near·B/β')
                        torus         n/2·α + n/4·B/β
    permute             direct        max(α, α') + B/β or, where it crosses, near·B/β'
    reorder             direct        as the permute; with two ranks, of half of B

Sources:

- Ring and pairwise: Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", 2005.
- Latency of rings over nodes, and trees: NCCL, src/graph/tuning.cc. Its trees are double binary trees (Sanders, Speck,
  Träff 2009) between nodes and a chain inside a node.
- Rings share the uplink: Singh et al., AxoNN, 2024.
- Star, for links where latency dominates: TPI-LLM, 2024.
- Torus: n ranks send B/n over a mean distance of n/4, on 2n one-way links.
- Gloo: all_reduce and all_gather are rings, all_to_all is pairwise, and torch's reduce_scatter over gloo is an
  all-reduce and a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from shardc.runtime.collectives.all_gather import all_gather
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.runtime.collectives.all_to_all import all_to_all
from shardc.runtime.collectives.collective import AnyCollective
from shardc.runtime.collectives.permute import permute
from shardc.runtime.collectives.reduce_scatter import reduce_scatter
from shardc.runtime.collectives.reorder import reorder


@dataclass(frozen=True)
class Line:
    """Seconds of one algorithm over the bytes B of the local operand: `latency + B * per_byte`."""

    latency: float
    per_byte: float

    def __add__(self, other: Line) -> Line:
        return Line(self.latency + other.latency, self.per_byte + other.per_byte)

    def at(self, size: float) -> float:
        """Seconds of an operand of `size` bytes."""
        return self.latency + size * self.per_byte

    def of(self, part: float) -> Line:
        """The line over B of an algorithm whose operand has `B * part` bytes."""
        return Line(self.latency, self.per_byte * part)


class Wires(NamedTuple):
    """One mesh axis as its links see it: `near` of its ranks are in each of `nodes` nodes.

    `inside` and `between` are seconds a hop and seconds a byte: of one device inside a node, and of one ring on its
    share of the uplink between nodes.
    """

    near: int
    nodes: int
    inside: Line
    between: Line

    @property
    def ranks(self) -> int:
        """Ranks on the axis."""
        return self.near * self.nodes

    @property
    def slowest(self) -> Line:
        """The latency and the seconds a byte of the slower of the links in use."""
        inside = self.inside if self.near > 1 else Line(0.0, 0.0)
        between = self.between if self.nodes > 1 else Line(0.0, 0.0)
        return Line(max(inside.latency, between.latency), max(inside.per_byte, between.per_byte))

    @property
    def local(self) -> Wires:
        """The part of the axis inside a node."""
        return self._replace(nodes=1)

    @property
    def across(self) -> Wires:
        """The axis between nodes, if every device of a node runs its own ring. They share what one ring had."""
        return Wires(1, self.nodes, self.inside, self.between.of(self.near))


def _round(wires: Wires) -> Line:
    """Once round the ring, as a line over the bytes of the chunk that every rank passes on."""
    latency = (wires.ranks - wires.nodes) * wires.inside.latency + (wires.nodes - 1) * wires.between.latency
    return Line(latency, (wires.ranks - 1) * wires.slowest.per_byte)


def _twice(line: Line) -> Line:
    return line + line


def _all_reduce_ring(wires: Wires) -> Line:
    return _twice(_round(wires).of(1 / wires.ranks))


def _all_reduce_tree(wires: Wires) -> Line:
    chain, depth = wires.near - 1, math.ceil(math.log2(wires.nodes))
    latency = chain * wires.inside.latency + depth * wires.between.latency
    return _twice(Line(latency, wires.slowest.per_byte))


def _all_reduce_star(wires: Wires) -> Line:
    slowest = wires.slowest
    return _twice(Line(slowest.latency, (wires.ranks - 1) * slowest.per_byte))


def _all_reduce_hierarchical(wires: Wires) -> list[Line]:
    inside, across = _twice(_round(wires.local).of(1 / wires.near)), wires.across
    return [inside + between(across).of(1 / wires.near) for between in (_all_reduce_ring, _all_reduce_tree)]


def _all_gather_direct(wires: Wires) -> Line:
    inside = (wires.near - 1) * wires.inside.per_byte
    across = (wires.ranks - wires.near) * wires.near * wires.between.per_byte
    return Line(wires.slowest.latency, max(inside, across))


def _all_gather_hierarchical(wires: Wires) -> Line:
    return _round(wires.across) + _round(wires.local).of(wires.nodes)


def _reduce_scatter_hierarchical(wires: Wires) -> Line:
    return _round(wires.local).of(1 / wires.near) + _round(wires.across).of(1 / wires.ranks)


def _all_to_all_pairwise(wires: Wires) -> Line:
    far = wires.ranks - wires.near
    latency = (wires.near - 1) * wires.inside.latency + far * wires.between.latency
    return Line(latency, _all_gather_direct(wires).per_byte / wires.ranks)


def _all_to_all_torus(wires: Wires) -> Line:
    slowest = wires.slowest
    return Line(wires.ranks / 2 * slowest.latency, wires.ranks / 4 * slowest.per_byte)


def _permute(wires: Wires) -> Line:
    across = wires.across.between.per_byte if wires.nodes > 1 else 0.0
    return Line(wires.slowest.latency, max(across, wires.inside.per_byte if wires.near > 1 else 0.0))


def _reorder(wires: Wires) -> Line:
    return _permute(wires).of(reorder.sent(wires.ranks, 1.0))


Formula = Callable[[Wires], Line | list[Line]]
ALGORITHMS: dict[AnyCollective, dict[str, Formula]] = {
    all_gather: {
        "ring": _round,
        "direct": _all_gather_direct,
        "hierarchical": _all_gather_hierarchical,
    },
    reduce_scatter: {
        "ring": lambda wires: _round(wires).of(1 / wires.ranks),
        "hierarchical": _reduce_scatter_hierarchical,
        all_reduce.name: _all_reduce_ring,
    },
    all_reduce: {
        "ring": _all_reduce_ring,
        "tree": _all_reduce_tree,
        "star": _all_reduce_star,
        "direct": _all_gather_direct,
        "hierarchical": _all_reduce_hierarchical,
    },
    all_to_all: {"pairwise": _all_to_all_pairwise, "torus": _all_to_all_torus},
    permute: {"direct": _permute},
    reorder: {"direct": _reorder},
}
"""Per collective the algorithms that a hardware file may list, as functions of the wiring."""

BY_NAME: dict[str, AnyCollective] = {collective.name: collective for collective in ALGORITHMS}
"""Collectives by the names that hardware files use."""

TEXTBOOK: dict[AnyCollective, tuple[str, ...]] = {
    collective: (next(iter(algorithms)),) for collective, algorithms in ALGORITHMS.items()
}
"""What an unknown backend is assumed to run: rings and pairwise exchanges."""


def lines(collective: AnyCollective, algorithms: tuple[str, ...], wires: Wires) -> list[Line]:
    """The lines of the algorithms that a backend chooses among; one algorithm may have several."""
    result: list[Line] = []
    for name in algorithms:
        line = ALGORITHMS[collective][name](wires)
        result += line if isinstance(line, list) else [line]
    return result
