"""Bucket: small collectives of gradients become one over a flat buffer, so that its latency is paid once.

    %g = mm(%t, %x)                              f32[512, 256] +sum@dp
    %r = all_reduce(%g, axis=dp)                 f32[512, 256]
    %h = sum(%t, [0])                            f32[512] +sum@dp
    %s = all_reduce(%h, axis=dp)                 f32[512]
becomes
    %g = mm(%t, %x)                              f32[512, 256] +sum@dp
    %h = sum(%t, [0])                            f32[512] +sum@dp
    %b = all_reduce_bucket([%g, %h], axis=dp)
    %r = %b[0]                                   f32[512, 256]
    %s = %b[1]                                   f32[512]

A collective may wait for others where its result only becomes gradients, by way of views, casts and more conversions,
which wait with it. Chains (over dp, then over tp) are joined step by step; if wanted, only where that saves more than
backward could hide of what waits with them. How much a bucket holds, and which gradients are better off alone, is
reckoned from the link (`shardc/cost/buckets.py`).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import fx

from shardc.analysis.operands import collective_of, operand_bytes
from shardc.analysis.reductions import becoming_gradients
from shardc.cost.buckets import Buckets
from shardc.ir.facts import Lowered, describe, dtype_of, laid, layer_of, lowered
from shardc.ir.partition import Partition, partition
from shardc.ir.program import Program, call
from shardc.ir.versions import GraphVersion
from shardc.planning.compilation import Compilation, compiler_pass
from shardc.runtime.collectives.collective import AnyCollective

NEARLY_FULL, MOST_FULL = 0.75, 2.0
"""How full a bucket is, as part of what its link would have, that ends where one did in another layer: at least, and at
most."""

SMALL = 0.01
"""What part of a layer's gradients is small."""

BucketKind = tuple[AnyCollective, str, str, torch.dtype]
"""What collectives of one bucket have in common: which they are, axis, reduction, dtype."""


Places = dict[fx.Node, tuple[int, ...]]
"""Where nodes are in a graph: these sort as the nodes do."""


class Joined(NamedTuple):
    """What was joined: the bytes of the largest bucket, 0 where there is none; forward and backward as they are now.

    `held` is at most how many seconds backward might hide of what follows the members of buckets, if these did not
    wait for each other.
    """

    largest: int
    run: Partition
    held: float


@compiler_pass
def bucket(c: Compilation) -> Compilation:
    """Join collectives as the schedule has it."""
    schedule = c.schedule
    if c.lowered is schedule.localized:
        return replace(c, lowered=schedule.bucketed)
    if schedule.buckets is None:
        return c
    return replace(c, lowered=bucketed(c.lowered, c.program, schedule.buckets, schedule.apart)[0])


def bucketed(localized: GraphVersion, program: Program, buckets: Buckets, apart: bool) -> tuple[GraphVersion, Joined]:
    """The version in which collectives of gradients are joined, and what they are."""

    def write() -> tuple[fx.Graph, Joined]:
        graph = localized.take()
        return graph, join(graph, partition(graph, program), buckets, apart)

    graph, joined = write()
    return GraphVersion(lambda: write()[0], graph), joined


def join(graph: fx.Graph, run: Partition, buckets: Buckets, apart: bool = False) -> Joined:
    """Join the collectives of gradients of a localized graph, in place; `apart` are left those that would hold back
    more than a bucket saves."""
    largest, held = 0, 0.0
    waiting = becoming_gradients(run, graph)
    before, ready = _chained(run, waiting), made_at(graph, waiting)
    sizes = {node: operand_bytes(node, buckets.mesh)[0] for node in waiting if collective_of(node)}
    later = _later(run, waiting, sizes, buckets)
    places: Places = {node: (place,) for place, node in enumerate(graph.nodes)}
    backward = set(run.backward)
    while before:
        kind, nodes = _next(before)
        for members in _divided(kind, sorted(nodes, key=ready.__getitem__), sizes, later if apart else {}, buckets):
            largest = max(largest, sum(sizes[node] for node in members))
            held += sum(later[node] for node in members)
            backward.add(_join(graph, members, places))
        for node in nodes:
            del before[node]
    made = replace(run, backward=sorted(backward, key=places.__getitem__)) if largest else run
    return Joined(largest, made, held)


def made_at(graph: fx.Graph, waiting: Collection[fx.Node]) -> dict[fx.Node, int]:
    """For what waits, the place in the graph of the last operator that it is made from."""
    place: dict[fx.Node, int] = {}
    for number, node in enumerate(graph.nodes):
        place[node] = max(place[operand] for operand in node.all_input_nodes) if node in waiting else number
    return {node: place[node] for node in waiting}


def _chained(run: Partition, waiting: Collection[fx.Node]) -> dict[fx.Node, fx.Node | None]:
    """The collectives that may wait, in order, each with the one before it in its chain."""
    last: dict[fx.Node, fx.Node | None] = {}
    before: dict[fx.Node, fx.Node | None] = {}
    for node in run.backward:
        if node in waiting:
            last[node] = last.get(node.all_input_nodes[0])
            collective = collective_of(node)
            # the flat buffer of a bucket has chunks, and no runs of a folded dim
            if collective is not None and collective.bucket is not None and "order" not in node.kwargs:
                before[node] = last[node]
                last[node] = node
    return before


def _later(
    run: Partition, waiting: Collection[fx.Node], sizes: Mapping[fx.Node, float], buckets: Buckets
) -> dict[fx.Node, float]:
    """Seconds that backward could hide of the collectives that follow each, if it waited for no others."""
    alike: dict[tuple[AnyCollective, str], list[float]] = defaultdict(list)
    for node, size in sizes.items():
        alike[_single(node), str(node.kwargs.get("axis"))].append(size)
    hidden: dict[tuple[AnyCollective, str, float], float] = {}
    for (kind, axis), operands in alike.items():
        if not kind.local:
            fill = buckets.fill(kind, axis, operands) if kind.bucket is not None else 0.0
            for size in set(operands):
                taken = buckets.least(kind, axis, size, fill)
                hidden[kind, axis, size] = taken * buckets.hidden(kind, axis, size, fill)
    later: dict[fx.Node, float] = {}
    with_followers: dict[fx.Node, float] = {}
    for node in reversed(run.backward):
        if node in waiting:
            later[node] = sum([with_followers[user] for user in node.users if user in with_followers])
            with_followers[node] = later[node]
            if node in sizes:
                with_followers[node] += hidden.get((_single(node), str(node.kwargs.get("axis")), sizes[node]), 0.0)
    return later


def _single(node: fx.Node) -> AnyCollective:
    """The collective that a collective's node runs, alone or over a bucket."""
    collective = collective_of(node)
    assert collective is not None, node
    return collective.single


def _next(before: Mapping[fx.Node, fx.Node | None]) -> tuple[BucketKind, list[fx.Node]]:
    """Of the collectives that are left the first kind of which none waits for another kind; where all do, the first
    kind of which some need not wait."""
    kinds: dict[BucketKind, list[fx.Node]] = {}
    for node in before:
        axis, op = str(node.kwargs["axis"]), str(node.kwargs.get("op", "sum"))
        kinds.setdefault((_single(node), axis, op, dtype_of(node)), []).append(node)
    ready = {kind: [node for node in nodes if before[node] not in before] for kind, nodes in kinds.items()}
    whole = (kind for kind, nodes in kinds.items() if len(ready[kind]) == len(nodes))
    chosen = next(whole, None) or next(kind for kind, nodes in ready.items() if nodes)
    return chosen, ready[chosen]


def _divided(
    kind: BucketKind, nodes: Sequence[fx.Node], sizes: Mapping[fx.Node, float], later: Mapping[fx.Node, float],
    buckets: Buckets,
) -> list[list[fx.Node]]:  # fmt: skip
    """The buckets that collectives of one kind fill, in the order in which their operands are made."""
    collective, axis, *_ = kind
    fill = buckets.fill(collective, axis, [sizes[node] for node in nodes])
    joining = [node for node in nodes if buckets.saved(collective, axis, sizes[node], fill) > later.get(node, 0.0)]
    fill = buckets.fill(collective, axis, [sizes[node] for node in joining])

    def hides(rest: float) -> bool:
        """Whether more of a bucket is hidden than a collective of what is left takes."""
        alone = buckets.alone(collective, axis, fill)
        return buckets.hidden(collective, axis, fill, fill) * alone > buckets.alone(collective, axis, rest)

    buckets_made: list[list[fx.Node]] = [[]]
    for node, least in zip(joining, _least(joining, sizes, fill, hides), strict=True):
        buckets_made[-1].append(node)
        if sum(map(sizes.__getitem__, buckets_made[-1])) >= least:
            buckets_made.append([])

    def worth(members: Sequence[fx.Node]) -> bool:
        alone = sum(buckets.alone(collective, axis, sizes[node]) - later.get(node, 0.0) for node in members)
        return buckets.seconds(collective, axis, sum(map(sizes.__getitem__, members))) < alone

    return [members for members in buckets_made if len(members) > 1 and worth(members)]


def _least(
    nodes: Sequence[fx.Node], sizes: Mapping[fx.Node, float], fill: float, hides: Callable[[float], bool]
) -> list[float]:
    """For each collective the bytes from which on a bucket ends behind it. What is large of the last repeated layer
    does not wait for what is small, if more of it `hides` than the bytes that are left then take."""
    found, kinds = list[float](), dict[str, list[str]]()
    for node in nodes:
        kinds.setdefault(layer_of(node), []).append(_place(node))
    for _, alike in groupby(nodes, key=lambda node: kinds[layer_of(node)] if layer_of(node) else []):
        found += _least_alike(list(alike), sizes, fill)
    last = next(filter(None, map(layer_of, reversed(nodes))), "")
    mine = [at for at, node in enumerate(nodes) if last and layer_of(node) == last]
    large = [at for at in mine if sizes[nodes[at]] > SMALL * sum(sizes[nodes[at]] for at in mine)]
    if large and hides(sum(sizes[node] for node in nodes[large[-1] + 1 :])):
        found[large[-1]] = 0.0
    return found


def _least_alike(nodes: Sequence[fx.Node], sizes: Mapping[fx.Node, float], fill: float) -> list[float]:
    """The same of layers of one kind, or of what is in none. A bucket ends at one place of every layer, so that they
    stay alike: where a layer ends, if a bucket holds one or more, else where the first buckets are full."""
    layers = list(map(layer_of, nodes))
    if not layers[0]:
        return [fill] * len(nodes)
    whole = sum(sizes[node] for node in nodes) / len(set(layers))
    places = [_place(node) for node in nodes]
    full, held, passed = set[str](), 0.0, 0.0
    for node, place in zip(nodes, places, strict=True):
        held, passed = held + sizes[node], passed + (sizes[node] if full else 0.0)
        if held >= fill and passed < NEARLY_FULL * whole:
            held = 0.0
            full.add(place)
    found: list[float] = []
    for at, (place, layer) in enumerate(zip(places, layers, strict=True)):
        if fill >= whole:
            ends, enough = [layer] != layers[at + 1 : at + 2], fill - whole / 2
        else:
            ends, enough = place in full, NEARLY_FULL * fill
        found.append(enough if ends else MOST_FULL * fill)
    return found


def _place(node: fx.Node) -> str:
    """What a node is in a repeated layer, whatever its number is; "" outside of all."""
    module, layer = lowered(node).origin.module, layer_of(node)
    return f"{module.removeprefix(layer)} {lowered(node).origin.source} {laid(node)}" if layer else ""


def _join(graph: fx.Graph, members: Sequence[fx.Node], places: Places) -> fx.Node:
    """One bucket at the place of the last of its members, which become its pieces; what waits for them follows."""
    first, last = members[0], max(members, key=places.__getitem__)
    joining = _single(first).bucket
    assert joining is not None
    told = joining.keywords([node.kwargs for node in members])
    with graph.inserting_before(last):
        joined = call(graph, joining, ([node.args[0] for node in members],), told)
    facts = [lowered(node) for node in members]
    bases = tuple([one.base for one in facts if one.base is not None])
    describe(joined, Lowered(facts[0].origin, base=facts[0].base, members=bases))
    places[joined] = start = places[last]
    previous = joined
    for index, node in enumerate([*members, *sorted(_behind(members), key=places.__getitem__)]):
        previous.append(node)
        previous, places[node] = node, (*start, index)
    for index, node in enumerate(members):
        node.target, node.args, node.kwargs = operator.getitem, (joined, index), {}
    return joined


def _behind(members: Sequence[fx.Node]) -> set[fx.Node]:
    """All that is computed from the members."""
    followers: set[fx.Node] = set()
    stack = list(members)
    while stack:
        users = {user for user in stack.pop().users if user.op != "output"} - followers
        followers |= users
        stack += users
    return followers
