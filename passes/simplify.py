"""Simplify: what a rank would compute twice it computes once, and what changes no bit it does not compute at all.

    %v = view(%x, [64, 64])              f32[64@dp, 64]
    %w = view(%x, [64, 64])              f32[64@dp, 64]
    %k = mm(%w, %b)                      f32[64@dp, 64]
    %c = clone(%k)                       f32[64@dp, 64]
    %y = add(%c, %v)                     f32[64@dp, 64]
becomes
    %v = view(%x, [64, 64])              f32[64@dp, 64]
    %k = mm(%v, %b)                      f32[64@dp, 64]
    %y = add(%k, %v)                     f32[64@dp, 64]

Which calls change nothing is a table, `shardc/rules/rewrites/identities.py`. Equal calls are merged within forward and
within backward, never across: what backward computes again was planned so. A view that several layers read stands
behind what it views, so that the first of equal layers is like the others. No more memory is held at any line than
before: of equal calls, the second gives way only where the first is still there, or both are views of one value. What
the caller gives or gets, and what backward finds of forward, share no memory that they did not share.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import fx

from shardc.analysis.sharing import MemorySharing
from shardc.ir.facts import describe, layer_of, lowered
from shardc.ir.mesh import Mesh
from shardc.ir.partition import partition
from shardc.ir.program import Program
from shardc.planning.compilation import Compilation, compiler_pass
from shardc.rules.rewrites.identities import BY_OPERATOR, Identity, Shorter
from shardc.runtime.collectives.bucket import Bucket
from shardc.runtime.collectives.collective import Collective
from shardc.runtime.kernels import indexing
from shardc.runtime.kernels.random import DRAWS


@compiler_pass
def simplify(c: Compilation) -> Compilation:
    """Drop the calls that change nothing, and merge those that are equal."""
    program, mesh = c.program, c.mesh
    return replace(c, lowered=c.lowered.derived("simplify", lambda graph: simplified(graph, program, mesh)))


def simplified(graph: fx.Graph, program: Program, mesh: Mesh) -> fx.Graph:
    """Simplify a localized graph whose placeholders and outputs are those of `program`, in place."""
    _Simplifier(graph, program, mesh).run()
    for node in reversed(graph.nodes):
        # draws stay, needed or not: they move the random stream
        if not node.users and node.op == "call_function" and node.target not in DRAWS:
            graph.erase_node(node)
    return graph


class _Simplifier:
    def __init__(self, graph: fx.Graph, program: Program, mesh: Mesh) -> None:
        self.graph, self.mesh = graph, mesh
        run = partition(graph, program)
        self.phase = {**dict.fromkeys(run.forward, "forward"), **dict.fromkeys(run.backward, "backward")}
        self.returned = {*run.outputs, *run.gradients}
        self.sharing = MemorySharing(graph, run, mesh)
        self.first: dict[object, fx.Node] = {}
        """Of every call, by what it calls, the one that its equals give way to."""
        self.hoisted: set[fx.Node] = set()

    def run(self) -> None:
        for place, node in enumerate(list(self.graph.nodes)):
            # what is not computed in either phase is not computed at all
            if node in self.phase and not self._rewritten(node, place):
                self._merged(node, place)

    def _rewritten(self, node: fx.Node, place: int) -> bool:
        """Whether a row of the table took a node away; its arguments may be shorter now."""
        for row in _told(node.target).rows:
            found = row.becomes(*node.args, **node.kwargs)
            if isinstance(found, Shorter) and self._reaches(node, found.args[0]):
                node.args = found.args
                return self._rewritten(node, place)
            if isinstance(found, fx.Node) and self._may_stand_for(found, node, row, place):
                self._replace(node, found)
                return True
        return False

    def _reaches(self, node: fx.Node, further: fx.Node) -> bool:
        """Whether a view may read what its operand views: both in one memory, and read in the same phase."""
        operand: Any = node.args[0]
        return operand in self.sharing.views and self._in_phase(further, operand, node)

    def _in_phase(self, further: fx.Node, operand: fx.Node, node: fx.Node) -> bool:
        """Whether `further`, which `operand` reads, is there for `node` too: backward finds of forward only what is
        kept."""
        return further.op == "placeholder" or self.phase[operand] == self.phase[node]

    def _may_stand_for(self, found: fx.Node, node: fx.Node, row: Identity, place: int) -> bool:
        if node in self.returned or not self._alike(found, node):
            return False
        operand = next(iter(node.all_input_nodes))
        if found not in node.all_input_nodes:
            held = self.sharing.lives_until[found] >= place or len(operand.users) == 1
            if not held or not self._in_phase(found, operand, node):
                return False
        if row.operator.is_view:
            return True
        known = self.sharing.contiguous
        lies = known.issuperset(node.all_input_nodes) if row.contiguous else self.sharing.is_dense(found)
        return lies and self.sharing.may_join(found, node)

    def _merged(self, node: fx.Node, place: int) -> None:
        """Let an equal call that was made before stand for this one, if that holds no more memory."""
        if not _told(node.target).pure or lowered(node).layout is None:
            return
        key = id(node.target), self.phase[node], node.args, tuple(node.kwargs.items())
        try:
            first = self.first.setdefault(key, node)
        except TypeError:  # of an argument that cannot be hashed, as a slice
            return
        if first is node or node in self.returned or not self._alike(first, node) or not _same(first, node):
            return
        view = node in self.sharing.views
        if view or (self.sharing.lives_until[first] >= place and self.sharing.may_join(first, node)):
            if view and layer_of(first) != layer_of(node):
                self._hoist(first)
            self._replace(node, first)
        else:
            self.first[key] = node

    def _hoist(self, view: fx.Node) -> None:
        """Move a view that several layers read behind what it views. A repeated layer is then like the others where it
        alone made the view. What is viewed is held as long as before."""
        if view in self.hoisted:
            return
        self.hoisted.add(view)
        phase = self.phase[view]
        (operand,) = view.all_input_nodes
        if self.phase.get(operand) == phase:
            operand.append(view)
            return
        beginning = next(node for node in self.graph.nodes if self.phase.get(node) == phase)
        if beginning is not view:
            beginning.prepend(view)

    def _alike(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether two values have the same dtype and layout."""
        first, second = lowered(one), lowered(other)
        if first.layout is None or second.layout is None or first.dtype is not second.dtype:
            return False
        if first.layout is second.layout:
            return True
        ranks = len(first.layout.dims), len(second.layout.dims)
        return ranks[0] == ranks[1] and first.layout.simplify(self.mesh) == second.layout.simplify(self.mesh)

    def _replace(self, node: fx.Node, stays: fx.Node) -> None:
        """Let the readers of a node read another; where forward was to keep the one, it keeps the other."""
        if lowered(node).kept:
            describe(stays, replace(lowered(stays), kept=True))
        self.sharing.join(node, stays)
        node.replace_all_uses_with(stays)
        self.graph.erase_node(node)


class _Facts(NamedTuple):
    """What is told of a target: the rows of the table, and whether equal calls make equal values."""

    rows: tuple[Identity, ...]
    pure: bool


@cache
def _told(target: Any) -> _Facts:
    return _Facts(BY_OPERATOR.get(target, ()), _is_pure(target))


def _is_pure(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        random = torch.Tag.nondeterministic_seeded in target.tags
        return target.namespace == "aten" and not target._schema.is_mutable and not random
    if isinstance(target, Collective):
        return not isinstance(target, Bucket)
    return target in (indexing.rebase, indexing.pad_dummy, indexing.fill, indexing.drop_dummy)


def _same(one: fx.Node, other: fx.Node) -> bool:
    """Whether arguments that are equal are the same: 0.0 == -0.0, and 1 == True."""
    return repr((one.args, one.kwargs)) == repr((other.args, other.kwargs))
