"""When operators run, when values are read, and what may be run again.

Generated code runs all of forward, then all of backward. An operator of forward may run a second time in backward, just
before one of its results is first read there. What it reads must be there by then: kept, or made again itself. To know
how long such values are held without knowing what else runs again, forward is cut into *windows*, and a window is made
again from what was kept at its waist:

    embedding | norm q k v attention proj add  norm up gelu down add | norm q k v ... add | norm head loss
              ^ window                                                ^ window             ^ window

Waists are places that a single value crosses. Stretches between waists that repeat in turns (attention, MLP, attention,
...) are one window together, as Chen et al. 2016 ("Training deep nets with sublinear memory cost") segment by layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import fx

from shardc.graph import Program, Role, forward_part
from shardc.rules.factoring import Factored, Key, Op

_EVERYWHERE = 8
"""Readers from which on a value (a mask, what a decoder reads of its encoder) does not count at waists."""
_OURS = frozenset({"shardc::attention"})
_TURNS = 8  # stretches that one window consists of, at most


class Schedule:
    """The order of operators: `position` of each, `border` the last of forward. `readers` has, per base value, the
    positions of what reads it in forward and in backward; outputs are read at the end of forward. `repeatable` are the
    operators that may run again; `rerun` tells when each would, and `again`, per value that they read, when the first
    and the last of them would."""

    def __init__(self, factored: Factored) -> None:
        program = factored.program
        self.forward = forward_part(program.graph, program.outputs, program.results)
        given = zip(program.placeholders, program.inputs, strict=True)
        self.forward |= {node for node, port in given if port.role is not Role.TANGENT}
        order = sorted(factored.ops, key=lambda op: op.node not in self.forward)
        self.position = {op.node: place for place, op in enumerate(order)}
        self.length = len(order)
        self.border = sum(op.node in self.forward for op in order) - 1
        self.readers: dict[Key, tuple[list[int], list[int]]] = {}
        for op in order:
            for operand in op.operands:
                self._read(operand.value.key, self.position[op.node])
        for port, node in zip(program.outputs, program.results, strict=True):
            if node is not None:
                key = factored.values[node].key  # a gradient is laid as its parameter as soon as it is there
                self._read(key, self.position[key[0]] if port.role is Role.GRADIENT else self.border)
        window = _windows(order[: self.border + 1], self.readers, program)
        self.repeatable = {op.node for op in order[: self.border + 1] if _pure(op) and self._stays(op, window)}
        self.rerun: dict[fx.Node, int] = {}
        self.again: dict[Key, tuple[int, int]] = {}
        for op in reversed(order[: self.border + 1]):
            if op.node in self.repeatable:
                self._wanted_by(op)

    def _read(self, key: Key, position: int) -> None:
        self.readers.setdefault(key, ([], []))[position > self.border].append(position)

    def _stays(self, op: Op, window: Sequence[int]) -> bool:
        """Whether forward reads the results of an operator in its own window only."""
        own = window[self.position[op.node]]
        return all(window[place] == own for r in op.results for place in self.readers.get(r.key, ([], []))[0])

    def _wanted_by(self, op: Op) -> None:
        """An operator that runs again does so when one of its results is first read."""
        found: list[int] = []
        for result in op.results:
            found += [*self.readers.get(result.key, ([], []))[1], *self.again.get(result.key, ())]
        if not found:
            return
        self.rerun[op.node] = min(found)
        for operand in op.operands:
            first, last = self.again.get(operand.value.key, (self.length, 0))
            self.again[operand.value.key] = min(first, *found), max(last, min(found))


def _pure(op: Op) -> bool:
    """Whether an operator, of torch's or ours, gives the same again: it draws nothing and changes nothing."""
    target = op.node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target.namespace not in ("aten", "prims") and target.name() not in _OURS:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable


def _windows(forward: Sequence[Op], readers: dict[Key, tuple[list[int], list[int]]], program: Program) -> list[int]:
    """The number of the window of every operator of forward."""
    waists = _waists(forward, readers, program)
    stretches = [forward[start:stop] for start, stop in zip([0, *waists], [*waists, len(forward)], strict=True)]
    kinds = [tuple(_kind(op) for op in stretch) for stretch in stretches]
    first, turns = _turns(kinds)
    return [(i - first) // turns for i, stretch in enumerate(stretches) for _ in stretch]


def _waists(forward: Sequence[Op], readers: dict[Key, tuple[list[int], list[int]]], program: Program) -> list[int]:
    """The positions before which a single value crosses, of inputs that are real numbers and what parameters had a part
    in."""
    ports = dict(zip(program.placeholders, program.inputs, strict=True))
    learned: set[Key] = set()
    crossing = [0] * (len(forward) + 1)
    for position, op in enumerate(forward):
        port, results = ports.get(op.node), [result.key for result in op.results]
        counts = port is not None and port.role is Role.INPUT and any(t.is_floating_point() for t in _tensors(op.node))
        if any(operand.value.key in learned for operand in op.operands):
            counts = True
            learned.update(results)
        elif port is not None and port.role is Role.PARAMETER:
            learned.update(results)
        places = [readers.get(key, ([], []))[0] for key in results if counts]
        for last in (max(each, default=0) for each in places if len(each) < _EVERYWHERE):
            for place in range(position + 1, last + 1):
                crossing[place] += 1
    return [place for place in range(1, len(forward)) if crossing[place] == 1]


def _kind(op: Op) -> Hashable:
    shapes = tuple(tuple(value.shape) for value in _tensors(op.node))
    return op.node.target if op.node.op == "call_function" else op.node.op, shapes


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    return [one for one in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(one, torch.Tensor)]


def _turns(kinds: Sequence[Hashable]) -> tuple[int, int]:
    """Where the longest run begins in which stretches repeat in turns, and how many take turns."""
    best, first, turns = 0, 0, 1
    for count in range(1, _TURNS + 1):
        length = 0
        for place, (one, other) in enumerate(zip(kinds, kinds[count:], strict=False)):
            length = length + 1 if one == other else 0
            if length > best + (count - turns):
                best, first, turns = length, place - length + 1, count
    return first, turns
