"""When operators run, when values are read, and what may run again.

Generated code runs all of forward, then all of backward. An operator of forward may run a second time in backward, just
before one of its results is first read there. Its operands must be there by then: kept, or made again themselves.

How long such values are held must not depend on what else runs again. So forward is cut into *windows*, and a window is
made again from what was kept at its waist:

    embedding | norm q k v attention proj add  norm up gelu down add | norm q k v ... add | norm head loss
              ^ window                                                ^ window             ^ window

A waist is a position that a single value crosses. Stretches between waists that repeat in turns (attention, MLP,
attention, ...) are one window together, as Chen et al. 2016 ("Training deep nets with sublinear memory cost") segment
by layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import fx

from shardc.ir.program import Program, Role, forward_part, value_of
from shardc.rules.factors.factored import Factored, Key, Op
from shardc.runtime.kernels.random import REPEATABLE

_EVERYWHERE, _MASK = 8, 3
"""How many readers a value (an encoder's output in a decoder), or an input (a mask), has at least if it does not count
at waists; and how many values (the logits of all routers, for a loss) an operator joins if it does not count as a
reader."""
_OURS = frozenset({"shardc::attention"})
_TURNS = 8  # stretches that one window consists of, at most
_REPEATS = 2  # times that turns are repeated, at least, to be told apart from a longer run beside them


class RunOrder:
    """The order of operators at positions `0 .. length - 1`: forward up to `border`, then backward.

    An operator of forward that may run again also has a position in backward (`rerun`), before the first operator that
    would read its result. `readers` are, per base value, the positions of its readers in forward and in backward;
    outputs are read at the end of forward. `reread` are, per value, the positions of the first and the last operator
    that would read it to run again.
    """

    def __init__(self, factored: Factored) -> None:
        program = factored.program
        self.forward = forward_part(program.graph, program.outputs, program.results)
        ports = zip(program.placeholders, program.inputs, strict=True)
        self.forward |= {node for node, port in ports if port.role is not Role.TANGENT}
        order = sorted(factored.ops, key=lambda op: op.node not in self.forward)
        self.border = sum(op.node in self.forward for op in order) - 1
        self.position = {op.node: place for place, op in enumerate(order)}
        self.readers: dict[Key, tuple[list[int], list[int]]] = {}
        for op in order:
            for operand in op.operands:
                self._read(operand.value.key, self.position[op.node])
        for port, node in zip(program.outputs, program.results, strict=True):
            if node is not None:
                key = factored.values[
                    node
                ].key  # a gradient is converted to its parameter's layout as soon as it is made
                self._read(key, self.position[key[0]] if port.role is Role.GRADIENT else self.border)
        self.rerun: dict[fx.Node, int] = {}
        self.reread: dict[Key, tuple[int, int]] = {}
        self.length = len(order)
        self._insert(order, self._repeatable(order[: self.border + 1], program))

    def _read(self, key: Key, position: int) -> None:
        self.readers.setdefault(key, ([], []))[position > self.border].append(position)

    def _repeatable(self, forward: Sequence[Op], program: Program) -> dict[int, list[Op]]:
        """Per position of backward, the operators that may run again just before it, in order. Such an operator gives
        the same result again, and forward reads its results in its own window only."""
        window = _windows(forward, self.readers, program)
        first: dict[Key, int] = {}  # where backward first reads a value
        repeatable: dict[int, list[Op]] = {}
        for op in reversed(forward):
            if not (_pure(op) and self._stays(op, window)):
                continue
            readers = [place for result in op.results for place in self.readers.get(result.key, ([], []))[1]]
            position = min([*readers, *(first[r.key] for r in op.results if r.key in first)], default=None)
            if position is not None:
                repeatable.setdefault(position, []).insert(0, op)
                for operand in op.operands:
                    first[operand.value.key] = min(position, first.get(operand.value.key, position))
        return repeatable

    def _stays(self, op: Op, window: Sequence[tuple[int, int]]) -> bool:
        """Whether forward reads the results of an operator in its own window only."""
        number = window[self.position[op.node]]
        return all(window[place] == number for r in op.results for place in self.readers.get(r.key, ([], []))[0])

    def _insert(self, order: Sequence[Op], repeatable: Mapping[int, Sequence[Op]]) -> None:
        """Insert positions for the operators that may run again, and renumber those of backward."""
        renumbered, position = list(range(self.border + 1)), self.border + 1
        for place in range(self.border + 1, len(order)):
            for op in repeatable.get(place, ()):
                self.rerun[op.node] = position
                for key in {operand.value.key for operand in op.operands}:
                    self.reread[key] = self.reread.get(key, (position,))[0], position
                position += 1
            renumbered.append(position)
            position += 1
        self.length = position
        self.position = {node: renumbered[place] for node, place in self.position.items()}
        self.readers = {
            key: (forward, [renumbered[place] for place in backward])
            for key, (forward, backward) in self.readers.items()
        }


def _pure(op: Op) -> bool:
    """Whether an operator of torch or of shardc gives the same result when it runs again: it draws no random numbers
    but from a state or a seed, and writes to nothing."""
    target = op.node.target
    if target in REPEATABLE:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target.namespace not in ("aten", "prims") and target.name() not in _OURS:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable


def _windows(
    forward: Sequence[Op], readers: dict[Key, tuple[list[int], list[int]]], program: Program
) -> list[tuple[int, int]]:
    """The window of every operator of forward."""
    waists = _waists(forward, readers, program)
    stretches = [forward[start:stop] for start, stop in zip([0, *waists], [*waists, len(forward)], strict=True)]
    kinds = [tuple(_kind(op) for op in stretch) for stretch in stretches]
    grouped = _grouped(kinds, range(len(kinds)), 0, 1)
    return [window for window, stretch in zip(grouped, stretches, strict=True) for _ in stretch]


def _grouped(kinds: Sequence[Hashable], among: range, first: int, turns: int) -> Iterator[tuple[int, int]]:
    """The window of some stretches: those that repeat in turns are one. An encoder's may take two turns, and those of
    the decoder behind it three. Others are grouped by the `turns` of the run beside them, which is `first`."""
    start, own, length = _turns(kinds[among.start : among.stop])
    beside = len(among) < len(kinds)
    if not among or (beside and length < _REPEATS * own):
        yield from ((first, (place - first) // turns) for place in among)
        return
    start += among.start
    stop = start + length + own if length else among.stop
    yield from _grouped(kinds, range(among.start, start), start, own)
    yield from ((start, (place - start) // own) for place in range(start, stop))
    yield from _grouped(kinds, range(stop, among.stop), start, own)


def _waists(forward: Sequence[Op], readers: dict[Key, tuple[list[int], list[int]]], program: Program) -> list[int]:
    """The positions that a single value crosses, counted among floating-point inputs and values that depend on
    parameters. Parameters, buffers and constants are held anyway."""
    ports = dict(zip(program.placeholders, program.inputs, strict=True))
    joins = {position for position, op in enumerate(forward) if len(op.operands) >= _EVERYWHERE}
    learned: set[Key] = set()
    crossing = [0] * (len(forward) + 1)
    for position, op in enumerate(forward):
        port, results, many = ports.get(op.node), [result.key for result in op.results], 0
        if any(operand.value.key in learned for operand in op.operands):
            learned.update(results)
            many = _EVERYWHERE
        elif port is not None and port.role is Role.PARAMETER:
            learned.update(results)
        elif port is not None and port.role is Role.INPUT and _tensors(op.node)[0].is_floating_point():
            many = _MASK
        readers_of_results = [[r for r in readers.get(key, ([], []))[0] if r not in joins] for key in results]
        for last in (max(each, default=0) for each in readers_of_results if len(each) < many):
            for place in range(position + 1, last + 1):
                crossing[place] += 1
    return [place for place in range(1, len(forward)) if crossing[place] == 1]


def _kind(op: Op) -> Hashable:
    shapes = tuple(tuple(value.shape) for value in _tensors(op.node))
    return op.node.target if op.node.op == "call_function" else op.node.op, shapes


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = value_of(node)
    return [one for one in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(one, torch.Tensor)]


def _turns(kinds: Sequence[Hashable]) -> tuple[int, int, int]:
    """The longest run of stretches that repeat in turns: its first stretch, how many stretches take turns, and how many
    of them are repeated."""
    best, first, turns = 0, 0, 1
    for count in range(1, _TURNS + 1):
        length = 0
        for place, (one, other) in enumerate(zip(kinds, kinds[count:], strict=False)):
            length = length + 1 if one == other else 0
            if length > best + (count - turns):
                best, first, turns = length, place - length + 1, count
    return first, turns, best
