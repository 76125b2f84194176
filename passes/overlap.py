"""Overlap: a collective is started ahead of its reader, and the rank computes while it is under way.

    %r = all_reduce(%g, axis=dp)                 f32[512, 256]
    %t = mm(%u, %v)                              f32[64, 512]
    %h = add(%r, %x)                             f32[512, 256]
becomes
    %r = all_reduce(%g, axis=dp)                 f32[512, 256]           codegen: r = all_reduce.start(...)
    %t = mm(%u, %v)                              f32[64, 512]
    %w = wait(%r)                                f32[512, 256]
    %h = add(%w, %x)                             f32[512, 256]

Collectives that only make gradients are *posted*: started as soon as their operand is made. Nobody reads them before
backward ends, and there they are awaited; earlier, once they should have ended, where something follows (a
reduce-scatter over one axis, then an all-reduce over another) or where they hold their operand in memory.

All others are *fetched*: started as late as hides them, so that what they bring lies in memory as shortly as possible,
and never so early that more than the largest of them would lie there unread. So the weights of a layer that are
gathered from all ranks come while the layer before computes.

Where nothing is computed between the two, a collective stays as it was. Where nothing of it hides (over links of
`overlap` 0, or because the link's `stall` takes as long and nothing else is under way there) it is not started ahead;
what makes gradients then runs where it would have been, if anything that may be hidden follows. Nothing else changes
its order, and the collectives of an axis are the same, in the same order, on every rank.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import fx

from shardc.analysis.operands import collective_of
from shardc.analysis.reductions import passes_on
from shardc.analysis.timeline import Order, Times
from shardc.cost.clock import Clock, Flight
from shardc.ir.facts import describe, dtype_of, laid, layer_of, lowered
from shardc.ir.partition import Partition
from shardc.ir.program import call
from shardc.planning.compilation import Compilation, compiler_pass
from shardc.runtime.collectives.bucket import Bucket
from shardc.runtime.collectives.collective import Held, wait

PATIENCE = 2.0
"""How many times the seconds that it should take a collective is given, where nothing is gained by waiting for it
sooner: predictions may be off."""


@compiler_pass
def overlap(c: Compilation) -> Compilation:
    """Write the order of the schedule, and the waits."""
    order = c.schedule.order
    return replace(c, lowered=c.lowered.derived("overlap", lambda graph: _rewritten(graph, order)))


def ordered(
    run: Partition,
    ready: Mapping[fx.Node, int],
    times: Times,
    *,
    fetch: bool = True,
    between: bool = False,
    last: bool = False,
) -> tuple[Order, Order]:
    """In which order forward and backward of a localized graph are to run so that collectives are started early;
    without `fetch`, those of gradients only. `ready` tells what makes only gradients, and where it can begin. With
    `between`, layers stay alike: buckets are awaited where others begin, and if there are fewer than repeated layers,
    they begin where one ends; where the `last` one ends, too, though little is left behind it that hides them."""
    forward, backward = (
        _StreamOrder(half, ready, times, fetch, between, last).order() for half in (run.forward, run.backward)
    )
    return _worthwhile(forward, times), _worthwhile(backward, times)


class _StreamOrder:
    """Puts the nodes of forward, or of backward, into a new order."""

    def __init__(
        self,
        nodes: Sequence[fx.Node],
        ready: Mapping[fx.Node, int],
        times: Times,
        fetch: bool,
        between: bool,
        last: bool,
    ) -> None:
        self.nodes, self.mine, self.times = nodes, set(nodes), times
        self.light = {node for node in nodes if not times.sent[node] and passes_on(node)}
        self.clock = Clock(times.mesh, times.device)
        self.compute, self.seconds, self.operands = times.compute, times.sent, times.operands
        sent = [node for node in nodes if self.seconds[node]]
        leading = _leading(nodes, ready, {node for node in sent if self.clock.hides(_axis(node), math.inf)})
        self.posted = dict.fromkeys(node for node in sent if node in leading)
        self.fetched = [node for node in sent if node not in ready and self._hides(node)] if fetch else []
        apart = set(self.posted)  # with what is made of them
        for node in nodes:
            if not apart.isdisjoint(self.operands[node]):
                apart.add(node)
        self.trailing = apart.difference(self.posted)
        self.stream = [node for node in nodes if node not in apart]
        self.place = {node: place for place, node in enumerate(self.stream)}
        self.between, self.last = between, last
        self.passed = -1
        self.flying: dict[fx.Node, Flight] = {}
        self.watched: dict[fx.Node, float] = {}  # what is posted, and from when on something may come of waiting for it
        self.done: set[fx.Node] = set()
        self.made: Order = []
        # in an order that is the same on every rank, also of those that are ready at once
        self._chains(sorted(self.posted, key=ready.__getitem__))

    def _hides(self, node: fx.Node) -> bool:
        return self.clock.hides(_axis(node), self.seconds[node])

    def _chains(self, posted: Sequence[fx.Node]) -> None:
        """Per place of the stream what can be posted after it; what else must have landed before, and what after."""
        self.due: dict[int, list[fx.Node]] = defaultdict(list)
        self.missing: Counter[fx.Node] = Counter()
        self.following: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        self.after: dict[fx.Node, int] = {}
        layers = len(set(filter(None, map(layer_of, self.stream))))
        snaps = self.between and sum(isinstance(node.target, Bucket) for node in posted) < layers
        for node in posted:
            makers = self._makers(node)
            self.after[node] = max((self.place[maker] for maker in makers if maker in self.place), default=0)
            if snaps and isinstance(node.target, Bucket):
                self.after[node] = self._end_of_layer(self.after[node])
            self.due[self.after[node]].append(node)
            for maker in (one for one in makers if one in self.posted):
                self.missing[node] += 1
                self.following[maker].append(node)

    def _end_of_layer(self, place: int) -> int:
        """The place of the last operator of the repeated layer that a place is in; the place itself outside of all, and
        in the last if that stays as it is."""
        layer, end = layer_of(self.stream[place]), place
        if not self.last and layer == next(filter(None, map(layer_of, reversed(self.stream))), ""):
            return place
        while layer and place < len(self.stream) and layer_of(self.stream[place]) == layer:
            end = end if self.seconds[self.stream[place]] else place
            place += 1
        return end

    def order(self) -> Order:
        fetches = self._fetches()
        for place, node in enumerate(self.stream):
            for one in fetches.get(place, ()):
                self._start(one)
            if not self._idle(node):
                self._emit(node)
            self.passed = place
            due = self.due.get(place, ())
            before = self._buckets() if any(isinstance(one.target, Bucket) for one in due) else []
            for one in due:
                self._post(one)
            for one in self._landed() + before:
                self._land(one)
        while landing := [one for one in self.flying if one in self.posted]:
            self._land(min(landing, key=self._rest))
        for node in self.nodes:
            self._emit(node)
            self._await(node)
        return self.made

    def _landed(self) -> list[fx.Node]:
        """What has landed, and is worth awaiting here."""
        landed = [one for one, time in self.watched.items() if time <= self.clock.now and not self._rest(one)]
        return [one for one in landed if not self.between or not isinstance(one.target, Bucket)]

    def _buckets(self) -> list[fx.Node]:
        """With `between`, the buckets that are awaited where others begin."""
        return [one for one in self.watched if self.between and isinstance(one.target, Bucket)]

    def _idle(self, node: fx.Node) -> bool:
        """Whether a node only passes on what has not come yet; it can wait for its reader."""
        return node in self.light and self._late(node)

    def _late(self, node: fx.Node) -> bool:
        return any(one in self.flying or (one in self.mine and one not in self.done) for one in self.operands[node])

    def _emit(self, node: fx.Node) -> None:
        if node in self.done:
            return
        self._supply(node)
        self.times.run(node, self.clock)
        if self.seconds[node]:
            self.clock.run(_axis(node), self.seconds[node])

    def _start(self, node: fx.Node) -> None:
        if node in self.done:
            return
        self._supply(node)
        self.clock.compute(self.compute[node])
        self.flying[node] = self.clock.start(_axis(node), self.seconds[node])
        if node in self.following:
            self.watched[node] = self.clock.now
        elif node in self.posted and _holds_operand(node):
            self.watched[node] = self.clock.now + PATIENCE * self.clock.beside(self.flying[node])

    def _rest(self, node: fx.Node) -> float:
        return self.clock.rest(self.flying[node])

    def _supply(self, node: fx.Node) -> None:
        """Put a node behind all that it reads."""
        for operand in self.operands[node]:
            if operand in self.mine:
                if operand not in self.done:
                    self._emit(operand)
                self._await(operand)
        self.done.add(node)
        self.made.append((node, False))

    def _await(self, node: fx.Node) -> None:
        if node in self.flying:
            self.clock.wait(self.flying.pop(node))
            self.watched.pop(node, None)
            self.made.append((node, True))

    def _post(self, node: fx.Node) -> None:
        if self.missing[node] or self.after[node] > self.passed:
            return
        if self._hides(node):
            self._start(node)
        else:
            self._emit(node)
            self._go_on(node)

    def _land(self, node: fx.Node) -> None:
        """Await a posted collective; then what follows can go on."""
        if node in self.flying:
            self._await(node)
            self._go_on(node)

    def _go_on(self, node: fx.Node) -> None:
        stack = [node]
        while stack:
            for user in stack.pop().users:
                if user in self.trailing and user not in self.done and not self._late(user):
                    self._emit(user)
                    stack.append(user)
        for one in self.following.pop(node, ()):
            self.missing[one] -= 1
            self._post(one)

    def _fetches(self) -> dict[int, list[fx.Node]]:
        """Per place of the stream the collectives that are started before it."""
        times = [0.0, *itertools.accumulate(self.compute[node] for node in self.stream)]
        latest, readers = self._latest(times)
        most = max(map(self._bytes, self.fetched), default=0)
        unread: list[tuple[int, int]] = []  # where what was fetched is read, and its bytes
        first: Counter[str] = Counter()  # per axis the place of the last start
        fetches: dict[int, list[fx.Node]] = defaultdict(list)
        for node in self.fetched:
            axis, made = _axis(node), [self.place[n] + 1 for n in self._makers(node) if n in self.place]
            room = _room(unread, self._bytes(node), most)
            place = min(bisect.bisect_right(times, latest[node]) - 1, self.place[node])
            place = max(place, first[axis], room, *made)
            if place <= self.place[node] and times[place] < times[readers[node]]:
                fetches[place].append(node)
                first[axis] = place
                bisect.insort(unread, (readers[node], self._bytes(node)))
            else:
                first[axis] = self.place[node] + 1
        return fetches

    def _latest(self, times: Sequence[float]) -> tuple[dict[fx.Node, float], dict[fx.Node, int]]:
        """For what is fetched, the time at which it is to be started, and the place in the stream of its reader."""
        latest: dict[fx.Node, float] = {}
        readers: dict[fx.Node, int] = {}
        free: dict[str, float] = defaultdict(lambda: math.inf)
        for node in reversed(self.fetched):
            axis, reading = _axis(node), list(self._readers(node))
            readers[node] = min((self.place[one] for one in reading if one in self.place), default=len(self.stream))
            wanted = [latest.get(one, times[self.place[one]]) for one in reading if one in self.place]
            end = min(free[axis], times[-1], *wanted)
            latest[node], free[axis] = end - PATIENCE * self.seconds[node], end - self.seconds[node]
        return latest, readers

    def _makers(self, node: fx.Node) -> set[fx.Node]:
        """What a node is made from, past what only passes values on."""
        makers: set[fx.Node] = set()
        stack = [node]
        while stack:
            for operand in self.operands[stack.pop()]:
                if operand in self.mine and (operand in self.light or operand in self.trailing):
                    stack.append(operand)
                elif operand in self.mine:
                    makers.add(operand)
        return makers

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """What reads a node, past what only passes values on."""
        stack = [node]
        while stack:
            for user in stack.pop().users:
                if user in self.light:
                    stack.append(user)
                elif user in self.mine:
                    yield user

    def _bytes(self, node: fx.Node) -> int:
        return math.prod(laid(node).local_shape(self.times.mesh)) * dtype_of(node).itemsize


def _holds_operand(node: fx.Node) -> bool:
    """Whether a collective holds its operand in memory, or a copy of it, while it is under way."""
    collective = collective_of(node)
    return collective is not None and collective.holds(node.kwargs) is not Held.NOTHING


def _axis(node: fx.Node) -> str:
    return str(node.kwargs["axis"])


def _leading(nodes: Sequence[fx.Node], ready: Container[fx.Node], hidden: Container[fx.Node]) -> set[fx.Node]:
    """What makes only gradients and may be hidden, or is followed by what may."""
    leading: set[fx.Node] = set()
    for node in reversed(nodes):
        if node in ready and (node in hidden or not leading.isdisjoint(node.users)):
            leading.add(node)
    return leading


def _room(unread: Sequence[tuple[int, int]], size: int, most: int) -> int:
    """The place from which on so many bytes more, unread, are no more than `most`."""
    for place, other in reversed(unread):
        size += other
        if size > most:
            return place
    return 0


def _worthwhile(order: Order, times: Times) -> Order:
    """Without the waits before which nothing runs while the collective does, or less than its stall takes."""
    runs = (0.0 if awaited else times.compute[node] + times.sent[node] for node, awaited in order)
    before = [0.0, *itertools.accumulate(runs)]
    started = {node: place for place, (node, awaited) in enumerate(order) if not awaited}

    def worth(node: fx.Node, place: int) -> bool:
        beside = before[place] - before[started[node] + 1]
        return times.device.hidden(times.mesh, _axis(node), beside) > 0.0

    return [(node, awaited) for place, (node, awaited) in enumerate(order) if not awaited or worth(node, place)]


def _rewritten(graph: fx.Graph, names: Sequence[tuple[str, bool]]) -> fx.Graph:
    """The nodes of forward, then of backward, in order, with the waits; written in place."""
    by_name = {node.name: node for node in graph.nodes}
    order = [(by_name[name], awaited) for name, awaited in names]
    ran = {node for node, _ in order}
    rest = [node for node in graph.nodes if node.op == "call_function" and node not in ran]
    here = next(node for node in graph.nodes if node.op != "placeholder")
    output, landed = graph.output_node(), dict[fx.Node, fx.Node]()
    for node, awaited in (*order, *((node, False) for node in rest)):
        if not awaited:
            if node is here:  # most stand where they are to stand
                here = here.next
            else:
                here.prepend(node)
            continue
        with graph.inserting_before(here):
            new = call(graph, wait, (node,))
        facts = lowered(node)
        describe(new, facts)
        if facts.kept:
            describe(node, replace(facts, kept=False))
        landed[node] = new
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new and user is not output)
    # once for all: it has as many arguments as there are gradients
    output.args = fx.map_arg(output.args, lambda node: landed.get(node, node))
    return graph
