"""Sharing: which values of a localized graph lie in the same memory, and who else reads or writes that memory.

%v = view(%x, [64, 64])     in the memory of %x, if %x is contiguous
%c = clone(%v)              in memory of its own
return [%c]                 the user may write to the memory of %c, and not to that of %x
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntFlag
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import fx

from shardc.ir.facts import laid, lowered
from shardc.ir.mesh import Mesh
from shardc.ir.partition import Partition
from shardc.runtime.collectives.collective import Collective

aten = torch.ops.aten

REGROUPS = (aten.view.default, aten.unsqueeze.default)
_WHOLE_VIEWS = frozenset({*REGROUPS, aten.permute.default})
"""Views of all elements, each once."""
_MAKES_CONTIGUOUS = frozenset(
    {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.embedding.default, aten.full.default}
    | {aten.arange.default, aten.arange.start, aten.arange.start_step}
)
_MAY_RETURN_OPERAND = frozenset({aten._unsafe_view.default, aten.reshape.default, aten.contiguous.default})


class Readers(IntFlag):
    """Who else has the memory of a value: the caller gave it, gets it, or backward finds it later."""

    NOBODY = 0
    GAVE = 1
    GETS = 2
    BACKWARD = 4


class _Kind(NamedTuple):
    """What a target says of how its result lies: in memory of its own (`new`), as a `view`, contiguous always or where
    all operands are."""

    new: bool
    view: bool
    contiguous: bool
    as_operands: bool


@cache
def _kind(target: Any) -> _Kind:
    if not isinstance(target, torch._ops.OpOverload):
        return _Kind(False, False, isinstance(target, Collective), False)
    view = target.is_view is True
    new = target.namespace == "aten" and not view and target not in _MAY_RETURN_OPERAND
    as_operands = target in REGROUPS or (new and torch.Tag.pointwise in target.tags)
    return _Kind(new, view, target in _MAKES_CONTIGUOUS, as_operands)


class MemorySharing:
    """Of every node of a localized graph, in what memory it lies. `lives_until` is the place in the graph of the last
    call that reads the memory of a value, infinity where forward or backward leaves it."""

    def __init__(self, graph: fx.Graph, run: Partition, mesh: Mesh) -> None:
        self.mesh = mesh
        self.contiguous: set[fx.Node] = set()
        self.views: set[fx.Node] = set()
        self.lives_until: dict[fx.Node, float] = {}
        self._above: dict[fx.Node, fx.Node] = {}
        self._readers: dict[fx.Node, Readers] = {}
        for node in [*run.given, *run.tangents]:
            self._have(node, Readers.GAVE)
            self.contiguous.add(node)  # so the runtime hands them to a rank
        nodes: list[fx.Node] = list(graph.nodes)
        for node in nodes:
            if node in run.operands:
                self._see(node, run.operands[node])
        for node in [*run.outputs, *run.gradients]:
            if node is not None:
                self._have(node, Readers.GETS)
        for node in run.saved:
            self._have(node, Readers.BACKWARD)
        self._find_ends(nodes, run)

    def readers(self, node: fx.Node) -> Readers:
        """Who else has the memory of a value."""
        return self._readers.get(self._home(node), Readers.NOBODY)

    def may_join(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether two values may lie in one memory, though they do not yet: nobody would see what is written into the
        other. Nobody writes to what is between forward and backward."""
        first, second = self.readers(one), self.readers(other)
        return not first or not second or first | second == Readers.BACKWARD

    def join(self, gone: fx.Node, stays: fx.Node) -> None:
        """What read `gone` reads `stays`."""
        self._tie(gone, stays)
        self.lives_until[stays] = max(self.lives_until.get(stays, -1), self.lives_until.get(gone, -1))

    def is_dense(self, node: fx.Node) -> bool:
        """Whether a value is all of its memory, and an elementwise operator's result would lie as it does."""
        while node.target in _WHOLE_VIEWS:
            node = node.args[0]  # type: ignore[assignment]
        return _kind(node.target).new

    def _home(self, node: fx.Node) -> fx.Node:
        """The value that stands for all that may lie in the same memory."""
        end = node
        while end in self._above:
            end = self._above[end]
        while node is not end:
            self._above[node], node = end, self._above[node]
        return end

    def _tie(self, one: fx.Node, other: fx.Node) -> None:
        one, other = self._home(one), self._home(other)
        if one is not other:
            self._have(other, self._readers.get(one, Readers.NOBODY))
            self._above[one] = other

    def _have(self, node: fx.Node, readers: Readers) -> None:
        home = self._home(node)
        if readers:
            self._readers[home] = self._readers.get(home, Readers.NOBODY) | readers

    def _see(self, node: fx.Node, operands: Sequence[fx.Node]) -> None:
        """Learn of a call; its operands are known."""
        kind = _kind(node.target)
        contiguous = kind.contiguous or (kind.as_operands and self.contiguous.issuperset(operands))
        if contiguous:
            self.contiguous.add(node)
        if not kind.new:
            # what is no operator of torch may return its operand: a collective over an axis of one rank does
            for operand in operands:
                self._tie(node, operand)
        if (
            kind.view
            and lowered(node).layout is not None
            and (contiguous or node.target is not aten.view.default or self._only_divides(node))
        ):
            self.views.add(node)

    def _only_divides(self, node: fx.Node) -> bool:
        """Whether a view only divides dims, which it can whatever the strides."""
        viewed: Any = node.args[0]
        before = [size for size in laid(viewed).local_shape(self.mesh) if size != 1]
        after = iter([size for size in laid(node).local_shape(self.mesh) if size != 1])
        for size in before:
            product = next(after, 0)
            while 0 < product < size:
                product *= next(after, 0)
            if product != size:
                return False
        return next(after, None) is None

    def _find_ends(self, nodes: Sequence[fx.Node], run: Partition) -> None:
        ends, backward = self.lives_until, set(run.backward)
        for node in (*run.given, *run.outputs, *run.gradients, *run.saved):
            if node is not None:
                ends[node] = math.inf
        for place in range(len(nodes) - 1, -1, -1):
            node = nodes[place]
            for operand in run.operands.get(node, ()):
                crosses = node in backward and operand not in backward
                end = math.inf if crosses else ends.get(node, -1) if node in self.views else -1
                ends[operand] = max(ends.get(operand, -1), end, place)
