"""Sums over experts in a traced graph: what is added, each with the gates that it is multiplied by.

add(add(zeros, mul(g0, f0(x))), mul(g1, f1(x)))    ->    Sum(node, [Term((g0,), f0), Term((g1,), f1)])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from shardc.capture.experts.networks import Network, is_tensor, network, operand, same_rows, shape
from shardc.capture.experts.routing import Gate, GateColumn, is_filled

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Term:
    """What one expert adds: its network's result, times gates and a number. `alone`: where the gates are true, nothing
    else may have been added before."""

    network: Network
    gates: tuple[Gate, ...] = ()
    factor: float = 1.0
    alone: bool = False
    inside: frozenset[fx.Node] = frozenset()

    def gated(self, gate: Gate, *inside: fx.Node) -> Term:
        return replace(self, gates=(*self.gates, gate), inside=self.inside | {*inside})


@dataclass(frozen=True)
class Sum:
    """The experts that a node adds, in order, and the value that it adds them to, if any. `chain` are the additions
    before the last."""

    node: fx.Node
    terms: tuple[Term, ...]
    rest: fx.Node | None
    inside: frozenset[fx.Node]
    chain: frozenset[fx.Node]


class ExpertSums:
    """Finds the sums over experts of one graph."""

    def __init__(self) -> None:
        self._formulas: dict[Any, tuple[str, str] | None] = {}
        self._terms: dict[fx.Node, Term | None] = {}
        self._added: dict[fx.Node, tuple[tuple[Term | fx.Node, ...], frozenset[fx.Node]]] = {}

    def find(self, nodes: Sequence[fx.Node]) -> list[Sum]:
        """The sums among `nodes`, the latest first."""
        found: list[Sum] = []
        done = set[fx.Node]()
        for node in reversed(nodes):
            if node in done or node.op != "call_function" or node.target not in _ADDS:
                continue
            made = self._sum(node)
            if made is not None:
                found.append(made)
                done |= made.inside | {made.node}
        return found

    def _sum(self, node: fx.Node) -> Sum | None:
        experts = self._last_kind(node)
        if len(experts) < 2:
            return None
        smaller = node
        while (below := self._operand_with(smaller, experts)) is not None:
            smaller = below
        parts, inside = self._parts(smaller)
        rest = [part for part in parts if part not in experts]
        if any(isinstance(part, Term) for part in rest) or len(rest) > 1:
            return None
        seen = inside.union(*(term.inside | term.network.inside for term in experts))
        return Sum(smaller, tuple(experts), rest[0] if rest else None, seen, inside - {smaller})  # type: ignore[arg-type]

    def _last_kind(self, node: fx.Node) -> list[Term]:
        """The terms that are experts of the kind of the last one."""
        terms = [part for part in self._parts(node)[0] if isinstance(part, Term)]
        return [term for term in terms if terms[-1].network.alike(term.network)]

    def _operand_with(self, node: fx.Node, experts: list[Term]) -> fx.Node | None:
        """An operand that adds all of them already."""
        if node.target is not aten.add.Tensor:
            return None
        for one in node.args[:2]:
            if is_tensor(one):
                inner = same_rows(one, set())  # type: ignore[arg-type]
                if inner.target in _ADDS and all(term in self._parts(inner)[0] for term in experts):
                    return inner
        return None

    def _parts(self, node: fx.Node) -> tuple[tuple[Term | fx.Node, ...], frozenset[fx.Node]]:
        """What a node adds, and the nodes that do."""
        waiting = [node]
        while waiting:
            current = waiting[-1]
            needs = [one for one in self._operands(current) if one not in self._added]
            if needs:
                waiting += needs
                continue
            waiting.pop()
            if current not in self._added:
                self._added[current] = self._joined(current)
        return self._added[node]

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The operands of an addition that may be additions themselves."""
        if self._term(node) is not None:
            return []
        written = _written(node)
        if written is not None:
            return [_inner(written[0])]
        if node.target is aten.add.Tensor and not node.kwargs:
            return [_inner(one) for one in node.args if is_tensor(one)]  # type: ignore[arg-type]
        return []

    def _joined(self, node: fx.Node) -> tuple[tuple[Term | fx.Node, ...], frozenset[fx.Node]]:
        term = self._term(node)
        if term is not None:
            return (term,), frozenset({node}) if node.target in _ADDS else frozenset()
        if is_filled(node, 0):
            return (), frozenset()
        several = self._several(node)
        if several is not None:
            return several, frozenset({node})
        written = _written(node)
        if written is not None:
            base, value, where, adds = written
            more = self._term(value)
            if more is not None:
                before, inside = self._added[_inner(base)]
                more = replace(more.gated(where, node), alone=more.alone or not adds)
                return (*before, more), inside | {node, _inner(node.args[1])}  # type: ignore[arg-type]
        if node.target is aten.add.Tensor and not node.kwargs:
            left, right = node.args
            known = [self._added[_inner(one)] for one in (left, right) if is_tensor(one)]  # type: ignore[arg-type]
            if len(known) == 2 or 0 in (left, right):
                return sum((parts for parts, _ in known), ()), frozenset({node}).union(*(seen for _, seen in known))
        return (node,), frozenset()

    def _several(self, node: fx.Node) -> tuple[Term, ...] | None:
        """The terms of a sum along a dim in which experts' results stand side by side."""
        results, gates = _stacked(node)
        if results is None or gates is None:
            return None
        terms: list[Term] = []
        for one in results.args[0]:  # type: ignore[union-attr]
            term = self._term(one)  # type: ignore[arg-type]
            if term is None:
                return None
            terms.append(term.gated(gates, node, results))
        return tuple(terms)

    def _term(self, node: fx.Node) -> Term | None:
        node = _inner(node)
        if node not in self._terms:
            self._terms[node] = self._made(node)
        return self._terms[node]

    def _made(self, node: fx.Node) -> Term | None:
        args: Any = node.args
        if len(shape(node)) < 2 if is_tensor(node) else True:
            return None
        if node.target is aten.mul.Tensor:
            numbers = [one for one in args if not isinstance(one, fx.Node)]
            if numbers:
                inner = self._term(args[0])
                return None if inner is None else replace(inner, factor=inner.factor * numbers[0])
            for gate, value in (args, args[::-1]):
                if _is_gate(gate, node) and (inner := self._term(value)) is not None:
                    return inner.gated(_gate(gate), node)
            return None
        if node.target is aten.where.self and is_filled(args[2], 0) and _is_gate(args[0], node):
            inner = self._term(args[1])
            return None if inner is None else inner.gated(_gate(args[0]), node)
        if node.target is aten._to_copy.default and is_tensor(args[0]):
            return self._term(args[0])
        if node.target is aten.add.Tensor and any(is_filled(one, 0) for one in args) and not node.kwargs:
            other = args[1] if is_filled(args[0], 0) else args[0]
            return self._term(other) if is_tensor(other) and shape(other) == shape(node) else None
        made = network(node, self._formulas) if node.target in _PRODUCTS else None
        return None if made is None else Term(made)


_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.add.Tensor)
_ADDS = (aten.add.Tensor, aten.where.self, aten.sum.dim_IntList, aten.bmm.default)


def _inner(node: fx.Node) -> fx.Node:
    return same_rows(node, set())


def _is_gate(gate: Any, node: fx.Node) -> bool:
    """Whether a factor is one number for each row of a value."""
    wide = shape(node)[-1]
    if not is_tensor(gate) or wide == 1:
        return False
    gate = _gate(gate)
    return math.prod(shape(gate)) * wide == math.prod(shape(node)) and shape(gate)[-1:] == (1,)


def _gate(gate: fx.Node) -> fx.Node:
    while gate.target is aten.expand.default and shape(gate.args[0])[-1:] == (1,):  # type: ignore[arg-type]
        gate = operand(gate)
    return gate


def _written(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, bool] | None:
    """Of a write into rows of a base: the base, the value, where it is written, and whether it is added there."""
    if node.target is not aten.where.self or not all(map(is_tensor, node.args)):
        return None
    where, value, base = node.args
    if is_filled(base, 0) or not _is_gate(where, node):
        return None
    where, inner = _gate(where), _inner(value)  # type: ignore[arg-type]
    if inner.target is aten.add.Tensor and not inner.kwargs and all(map(is_tensor, inner.args)):
        for one, other in (inner.args, inner.args[::-1]):
            if _inner(one) is _inner(base):  # type: ignore[arg-type]
                return base, other, where, True  # type: ignore[return-value]
    return base, value, where, False  # type: ignore[return-value]


def _stacked(node: fx.Node) -> tuple[fx.Node | None, GateColumn | None]:
    """The stack of results that a sum or a product goes along, and what stands beside each of them."""
    args: Any = node.args
    if node.target is aten.sum.dim_IntList and args[0].target is aten.mul.Tensor:
        rank = len(shape(args[0]))
        dims = [dim % rank for dim in args[1]]
        for gates, results in (args[0].args, args[0].args[::-1]):
            results = _results(results)
            if results is not None and dims == [_dim(results)] and is_tensor(gates):
                dim = dims[0] - rank + len(shape(gates))
                alone = math.prod(shape(gates)) * shape(results)[_width(results)] == math.prod(shape(results))
                return (results, GateColumn(gates, dim)) if dim >= 0 and alone else (None, None)
    if node.target is aten.bmm.default:
        for gates, results, turned in ((args[0], args[1], False), (args[1], args[0], True)):
            seen = results
            while seen.target in (aten.view.default, aten.expand.default, aten.clone.default):
                seen = seen.args[0]
            if seen.target is not aten.stack.default:
                continue
            count, dim = len(seen.args[0]), _dim(seen)
            last = len(shape(seen)) - 1
            lies = dim == (last if turned else last - 1)
            one = shape(gates)[2 if turned else 1] == 1 and shape(results)[2 if turned else 1] == count
            return (seen, GateColumn(gates, 1 if turned else 2)) if lies and one else (None, None)
    return None, None


def _results(node: Any) -> fx.Node | None:
    while isinstance(node, fx.Node) and node.target is aten.clone.default:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.target is aten.stack.default else None


def _dim(stack: fx.Node) -> int:
    return (*stack.args, 0)[1] % len(shape(stack))  # type: ignore[operator, return-value]


def _width(stack: fx.Node) -> int:
    last = len(shape(stack)) - 1
    return last if _dim(stack) != last else last - 1
