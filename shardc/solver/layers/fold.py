"""Fold a network of many equal layers to one of a few, and unfold what was found there.

    embed  L0 L1 L2 L3 ... L125  head        ->        embed  L0 L1 | L124 L125  head

A *layer* is a block of variables that repeats, block after block, in the order in which variables are numbered. There
may be several runs of blocks: say one of 4 variables a layer, and later one of 7 that counts down.

A run is recognised by what its variables cost and are linked by, not by names. How two runs count
against each other is told by the edges between them. The middle layers are cut out, and edges that cross the cut are
joined to the layer beyond it.

    variables  a b c b c b c b c d        period 2, from place 1 on, 4 layers

Nothing here has to be believed. A choice for the template gives one for the network, whose cost is then evaluated as
it stands. Messages for the template give messages for the network, and any messages prove a bound. Where layers are
less alike than they looked, the two do not meet, and the gap says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from shardc.solver import tuning
from shardc.solver.problem import Array, Edge, Problem
from shardc.solver.proof.certificate import Certificate, Lender

Integers = NDArray[np.int64]
Messages = dict[Edge, tuple[Array, Array]]

_NONE = -1
_PAIRS = ((0, 1), (1, 2), (0, 2))  # the places of the pairs of a triplet


@dataclass(frozen=True)
class _Blocks:
    """A run: `count` blocks of `period` variables each, from `start` on."""

    start: int
    period: int
    count: int

    @property
    def size(self) -> int:
        return self.period * self.count

    @property
    def stop(self) -> int:
        return self.start + self.size

    def in_turns(self, blocks: int) -> _Blocks:
        """The same with so many blocks as one; the last ones are left out where that does not go up."""
        many = max(blocks, 1)
        return _Blocks(self.start, self.period * many, self.count // many)


@dataclass(frozen=True)
class Fold:
    """The template, and per variable of the network its representative there."""

    template: Problem
    representative: list[int]
    edges: dict[Edge, Edge]
    """Per edge of the network the edge of the template whose variables come in the order of its own."""
    kept: list[int]
    """The variables of the network that the template consists of."""
    copies: set[Edge]
    """The edges of the network that the template does without: they are as others are."""
    places: Callable[[tuple[int, int, int]], Iterator[tuple[int, int, int]]]
    """Per three variables of the template the variables of the network for which they stand."""
    layers: Integers
    """Per variable of the network its layer, -1 for none."""
    ahead: dict[int, int]
    """Per variable of the template in the first layer behind the cut, the one in its place in the last before it."""
    cut: list[Edge]
    """The edges of the network that lead to layers that were cut out, or are within them."""

    @property
    def count(self) -> int:
        """The number of layers."""
        return int(self.layers.max()) + 1

    def over(self, problem: Problem) -> Fold:
        """The same fold of a network with the same variables, other costs, and no other edges. Raises ValueError for
        edges that are not known."""
        if not problem.edges.keys() <= self.edges.keys():
            raise ValueError(f"{min(problem.edges.keys() - self.edges.keys())} is no edge of what was folded")
        edges = {edge: self.edges[edge] for edge in problem.edges}
        cut = [edge for edge in self.cut if edge in problem.edges]
        return replace(self, template=_template(problem, self.kept, edges, self.copies), edges=edges, cut=cut)

    @cached_property
    def inside(self) -> set[int]:
        """The variables of the template that are in a layer."""
        return {i for i, v in enumerate(self.kept) if self.layers[v] != _NONE}

    def unfolded_choice(self, choice: Sequence[int]) -> list[int]:
        return [choice[r] for r in self.representative]

    def unfolded_certificate(self, certificate: Certificate) -> Certificate:
        """A certificate for the network: on each edge the messages of the edge that stands for it, and the triplets of
        the last layer before the cut in every layer that was cut out."""
        messages: Messages = {}
        for edge, other in self.edges.items():
            enter(messages, edge, other, certificate.messages)
        triplets: list[Lender] = []
        for lender in certificate.triplets:
            for variables in self.places(lender.variables):
                triplets.append(_placed(lender, variables))
                for i, j in _PAIRS:
                    enter(
                        messages, (variables[i], variables[j]), (lender.variables[i], lender.variables[j]),
                        certificate.messages,
                    )  # fmt: skip
        return Certificate(messages, tuple(triplets))

    def kept_lender(self, lender: Lender) -> Lender:
        """A triplet of the template over the variables of the network that it consists of."""
        a, b, c = (self.kept[v] for v in lender.variables)
        return _placed(lender, (a, b, c))


def enter(messages: Messages, edge: Edge, other: Edge, known: Mapping[Edge, tuple[Array, Array]]) -> None:
    """Enter for `edge` the messages of `other`, if it has any; the first entry stays."""
    (u, v), (a, b) = (edge, other) if edge[0] < edge[1] else ((edge[1], edge[0]), (other[1], other[0]))
    if (u, v) in messages:
        return
    if (a, b) in known:
        messages[u, v] = known[a, b]
    elif (b, a) in known:
        second, first = known[b, a]
        messages[u, v] = first, second


def _placed(lender: Lender, variables: tuple[int, int, int]) -> Lender:
    """The triplet over other variables, which are brought into ascending order."""
    order = sorted(range(3), key=variables.__getitem__)

    def loan(i: int, j: int) -> Array:
        """The loan to a pair by places in the lender's own order, rows for the place `i`."""
        table = lender.loans[_PAIRS.index((min(i, j), max(i, j)))]
        return table if i < j else np.ascontiguousarray(table.T)

    x, y, z = order
    return Lender(
        (variables[x], variables[y], variables[z]), (lender.groups[x], lender.groups[y], lender.groups[z]),
        (loan(x, y), loan(y, z), loan(x, z)),
    )  # fmt: skip


def fold(problem: Problem, kept: int) -> Fold | None:
    """The problem with only `kept` layers on either side of the cut; None if no layers repeat in it."""
    labels = _labels(problem)
    if labels is None:
        return None
    layer, shift = labels
    low, high = int(layer[layer != _NONE].min()) + kept - 1, int(layer.max()) - kept + 1
    if high - low - 1 < tuning.MIN_LAYERS - 2 * kept:
        return None
    return _Cut(problem, layer, shift, low, high).fold()


class _Cut:
    """Layers up to `low` and from `high` on stay. `shift` is the distance to the same variable of the next layer."""

    def __init__(self, problem: Problem, layer: Integers, shift: Integers, low: int, high: int) -> None:
        self.problem, self.layers, self.shifts = problem, layer, shift
        self.low, self.high, self.last = low, high, int(layer.max())
        self.gone = (layer > low) & (layer < high)
        self.kept: list[int] = np.flatnonzero(~self.gone).tolist()
        self.layer: list[int] = layer.tolist()  # read one by one, as triplets are
        self.shift: list[int] = shift.tolist()

    def fold(self) -> Fold | None:
        problem, number = self.problem, np.cumsum(~self.gone) - 1
        every = np.arange(len(problem.unary))
        stands = np.where(self.gone, every + (self.low - self.layers) * self.shifts, every)
        representative: list[int] = number[stands].tolist()
        ends = np.array(list(problem.edges), dtype=np.int64).reshape(-1, 2)
        lower = np.where(self.layers[ends] == _NONE, self.last + 1, self.layers[ends]).min(axis=1)
        met: list[tuple[int, int]] = number[self._met(ends, lower)].tolist()
        edges = {edge: (one, other) for edge, (one, other) in zip(problem.edges, met, strict=True)}
        sizes = [len(problem.unary[v]) for v in self.kept]
        if any(len(problem.unary[v]) != sizes[r] for v, r in enumerate(representative)):
            return None
        if any(problem.edges[edge].shape != (sizes[a], sizes[b]) for edge, (a, b) in edges.items()):
            return None
        copies = set(_where(problem.edges, (self.low < lower) & (lower < self.high)))
        template = _template(problem, self.kept, edges, copies)
        behind = [v for v in self.kept if self.layer[v] == self.high]
        ahead = {representative[v]: representative[self._at(v, self.low)] for v in behind}
        cut = _where(problem.edges, self.gone[ends[:, 0]] | self.gone[ends[:, 1]])
        return Fold(template, representative, edges, self.kept, copies, self._places, self.layers, ahead, cut)

    def _met(self, ends: Integers, lower: Integers) -> Integers:
        """Where edges stand in the template, as variables of the network: moved down until the `lower` layer of each is
        the last before the cut; what then lies beyond that layer is met again behind the cut."""
        layers = self.layers[ends]
        stays = (lower >= self.high) | (layers.max(axis=1) <= self.low)
        there = layers - np.maximum(lower - self.low, 0)[:, None]
        there = np.where(there <= self.low, there, np.minimum(there - self.low - 1 + self.high, self.last))
        return np.where(stays[:, None] | (layers == _NONE), ends, ends + (there - layers) * self.shifts[ends])

    def _places(self, variables: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
        """Behind the cut a template goes on as the network does right after its last layer before the cut."""
        originals = [self.kept[v] for v in variables]
        layers = [self.layer[x] for x in originals if self.layer[x] != _NONE]
        if not layers or min(layers) >= self.high or max(layers) < self.low:
            yield originals[0], originals[1], originals[2]
            return
        for up in range(self.high - self.low if min(layers) == self.low else 1):
            a, b, c = (self._moved(x, up) for x in originals)
            if min(a, b, c) != _NONE:
                yield a, b, c

    def _moved(self, x: int, up: int) -> int:
        """A variable of the template so many layers further on; -1 beyond the last layer."""
        layer = self.layer[x]
        if layer == _NONE:
            return x
        layer = up + (layer if layer <= self.low else layer - self.high + self.low + 1)
        return self._at(x, layer) if layer <= self.last else _NONE

    def _at(self, v: int, layer: int) -> int:
        """The variable that stands where `v` does, in another layer."""
        return v + (layer - self.layer[v]) * self.shift[v]


def _where(edges: Iterable[Edge], chosen: NDArray[np.bool_]) -> list[Edge]:
    return list(compress(edges, chosen.tolist()))


def _template(problem: Problem, kept: Sequence[int], edges: Mapping[Edge, Edge], copies: Set[Edge]) -> Problem:
    template = Problem([problem.unary[v] for v in kept], {}, [problem.names[v] for v in kept])
    for edge, table in problem.edges.items():
        if edge not in copies:
            template.add_edge(*edges[edge], table)
    return template


def _labels(problem: Problem) -> tuple[Integers, Integers] | None:
    """Per variable its layer (-1: none) and the distance to the same place in the next; None if nothing repeats."""
    runs = _disjoint(_runs(_signatures(problem)))
    if not runs:
        return None
    size = len(problem.unary)
    run, position = np.full(size, _NONE), np.zeros(size, dtype=np.int64)
    for i, one in enumerate(runs):
        run[one.start : one.stop] = i
        position[one.start : one.stop] = np.arange(one.stop - one.start) // one.period
    counting = _counting(problem, runs, run, position)
    layer, shift = np.full(size, _NONE), np.zeros(size, dtype=np.int64)
    ranges = [sorted((offset, offset + sign * (runs[i].count - 1))) for i, (sign, offset) in counting.items()]
    first, last = max(a for a, _ in ranges), min(b for _, b in ranges)
    if last - first + 1 < tuning.MIN_LAYERS:
        return None
    for i, (sign, offset) in counting.items():
        mine = run == i
        layer[mine] = offset + sign * position[mine] - first
        shift[mine] = sign * runs[i].period
    layer[(layer < 0) | (layer > last - first)] = _NONE
    return layer, shift


def _signatures(problem: Problem) -> Integers:
    """Equal numbers for variables of equal cost whose edges to earlier ones have equal tables. What many variables
    read tells them apart: layers that take turns may do so in what they read alone (positions, of local attention and
    of global)."""
    contents: dict[object, int] = {}
    behind: list[list[tuple[int, int]]] = [[] for _ in problem.unary]
    readers = Counter(u for u, _ in problem.edges)
    for (u, v), table in problem.edges.items():
        behind[v].append((id(table), u if readers[u] >= tuning.MANY_READERS else _NONE))
    known: dict[object, int] = {}
    signatures: list[int] = []
    for cost, tables in zip(problem.unary, behind, strict=True):
        unary = contents.setdefault(cost.tobytes(), len(contents))
        signatures.append(known.setdefault((unary, tuple(sorted(tables))), len(known)))
    return np.array(signatures, dtype=np.int64)


def _runs(signatures: Integers) -> Iterator[_Blocks]:
    """Runs of blocks, each followed by its like at least `MIN_LAYERS - 1` times."""
    last: dict[int, int] = {}
    distances: Counter[int] = Counter()
    for place, signature in enumerate(signatures.tolist()):
        if signature in last:
            distances[place - last[signature]] += 1
        last[signature] = place
    often = distances.most_common(tuning.PERIODS)
    near = [distance for distance, times in often if times >= tuning.MIN_LAYERS - 1]
    for period in dict.fromkeys(turns * distance for turns in range(1, tuning.TURNS + 1) for distance in near):
        if period * (tuning.MIN_LAYERS - 1) >= len(signatures):
            continue
        same = np.concatenate([[0], signatures[:-period] == signatures[period:], [0]]).astype(np.int64)
        edges = np.diff(same)
        for start, stop in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True):
            count = int(stop - start + period) // period
            if count >= tuning.MIN_LAYERS:
                yield _Blocks(int(start), period, count)


def _disjoint(runs: Iterator[_Blocks]) -> list[_Blocks]:
    """The longest ones that do not overlap, of equally long ones that with the shortest period; all of about as many
    layers. Where layers take turns, some runs repeat with every layer, others with every turn: all are counted in
    turns then.

    Forward is  a b a b a b a b  (four turns); parameters are alike in all layers,  p p p p p p p p:  four times  p p
    """
    apart: list[_Blocks] = []
    for run in sorted(runs, key=lambda r: (-r.period * r.count, r.period)):
        if all(run.stop <= other.start or other.stop <= run.start for other in apart):
            apart.append(run)
    long = [run for run in apart if tuning.LONG_RUN * run.size >= apart[0].size]
    layers = min((run.count for run in long), default=0)
    turns = [run.in_turns(round(run.count / layers)) if layers else run for run in apart]
    return [run for run in turns if abs(run.count - layers) <= 1]


def _counting(
    problem: Problem, runs: Sequence[_Blocks], run: Integers, position: Integers
) -> dict[int, tuple[int, int]]:
    """Per run (sign, offset) so that its layers count as those of the runs that it is linked to."""
    ends = np.array(list(problem.edges), dtype=np.int64).reshape(-1, 2)
    pairs = ends[(run[ends] != _NONE).all(axis=1) & (run[ends[:, 0]] != run[ends[:, 1]])]
    ballots = [
        np.stack([run[x], run[y], np.full(len(x), sign), position[x] - sign * position[y]], axis=1)
        for x, y in (pairs.T, pairs.T[::-1]) for sign in (1, -1)
    ]  # fmt: skip
    votes: dict[tuple[int, int], tuple[int, int]] = {}
    cast = Counter[tuple[int, ...]](map(tuple, np.stack(ballots, axis=1).reshape(-1, 4).tolist()))
    for (one, other, sign, distance), _ in cast.most_common():
        votes.setdefault((one, other), (sign, distance))  # position of `one` in terms of that of `other`
    counting: dict[int, tuple[int, int]] = {}
    for first in range(len(runs)):  # runs that nothing links, as those of encoder and decoder, count for themselves
        waiting = [] if first in counting else [first]
        counting.setdefault(first, (1, 0))
        while waiting:
            known = waiting.pop()
            sign, offset = counting[known]
            for other in range(len(runs)):
                if other not in counting and (known, other) in votes:
                    turn, distance = votes[known, other]
                    counting[other] = sign * turn, offset + sign * distance
                    waiting.append(other)
    return counting
