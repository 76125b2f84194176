"""Conflicts: demands and limits that cannot hold together unless a split dim is gathered or moved, found by z3.

Conversions make every set of layouts possible, at a price. So the question is what could hold without them. Then a
reader of a split value must split the same dim by the same axes, major to minor, and may split it further. A whole
value may be sliced, and partial sums may be reduced: neither converts a split.

A boolean says that an axis splits a factor of an operator; another that of two axes the first is major:

    maker's factor split by a            =>  reader's factor split by a, and nothing major to it that the maker lacks
    two factors of an operator           =>  not both split by a
    a demand (assumption)                =>  its dims are split by exactly these axes, in this order
    a limit of an operator (assumption)  =>  its factor is not split by these axes

Splits start at demands and propagate to readers. The model has only the booleans that are reachable from there: if
there is a solution, there is one in which all others are false. z3's core of assumptions is then thinned by deletion,
so that without any one member the others are feasible.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import z3

from shardc.ir.facts import origin_of
from shardc.ir.layout import is_folded
from shardc.ir.program import Role, value_of, where
from shardc.planning.constraints import Constraint
from shardc.planning.cost_network import CostNetwork
from shardc.planning.variables import base_demand
from shardc.rules.factors.factored import Key, Op
from shardc.rules.factors.strategy import Shape, splittable
from shardc.runtime.mesh.orders import axis_of

Axes = tuple[str, ...]


class Place(NamedTuple):
    """Factor number `factor` of operator number `op`."""

    op: int
    factor: int


class Fact(NamedTuple):
    """`place` is split by `axis`."""

    place: Place
    axis: str


@dataclass(frozen=True)
class Demand:
    """A demand on a base value: per leaf exactly these axes, None where it is open. `text` says it in the user's
    words."""

    text: str
    key: Key
    leaves: tuple[Axes | None, ...]


@dataclass(frozen=True)
class FoundConflict:
    """Demands and limits, by their texts, that cannot hold together. `path` are the operators through which a demand's
    split propagates to the others, `reason` what is wrong there, if the members do not say it."""

    members: tuple[str, ...]
    path: tuple[Op, ...]
    reason: str


@dataclass(eq=False)
class ConflictFinder:
    """The model of one program under some demands. Outputs and buffers that are written are whole where the network
    says so."""

    network: CostNetwork
    demands: Sequence[Demand]
    clauses: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        factored = self.network.factored
        self.ops = factored.ops
        self._number = {op.node: i for i, op in enumerate(self.ops)}
        self._shapes: list[Shape] = [self.network.options_of(op).shape for op in self.ops]
        self._readers: dict[Key, list[tuple[int, int]]] = {}
        for i, op in enumerate(self.ops):
            for k, operand in enumerate(op.operands):
                self._readers.setdefault(operand.value.key, []).append((i, k))
        self._exits: dict[Key, list[tuple[str, tuple[Place | None, ...]]]] = {}
        self._add_exits()
        self._cone: dict[Fact, Fact | None] = {}  # how each fact was first reached
        self._edges: dict[tuple[Place, Place], str] = {}  # under which assumption; "" for none
        self._guards: dict[str, int] = {}
        self._axes_of: dict[Place, list[str]] = {}
        self._orders: set[str] = set()
        self._reach()
        self._write()
        self.solver = z3.SolverFor("QF_FD")
        names = [f"f{i}" for i in range(len(self._cone))] + [f"g{i}" for i in range(len(self._guards))]
        names += sorted(self._orders)
        declared = [f"(declare-const {name} Bool)" for name in names]
        self.solver.from_string("\n".join([*declared, *self.clauses]))

    def minimal_conflicts(self, most: int = 20) -> list[FoundConflict]:
        """At most `most` minimal conflicts. Each has demands of the user, and no two have one in common."""
        demanded = {demand.text for demand in self.demands}
        left, conflicts = list(self._guards), list[FoundConflict]()
        while len(conflicts) < most and (core := self.core(left)) is not None:
            conflicts.append(FoundConflict(tuple(core), *self._meeting(core)))
            drop = demanded.intersection(core) or set(core)
            left = [text for text in left if text not in drop]
        return conflicts

    def core(self, texts: Collection[str]) -> list[str] | None:
        """A minimal subset of these assumptions that cannot hold together, demands first; None if all can."""
        core = self._refuted(texts)
        for text in list(core or ()):
            smaller = self._refuted([t for t in core if t != text]) if core and text in core else None
            core = smaller if smaller is not None else core
        return core

    def _refuted(self, texts: Collection[str]) -> list[str] | None:
        outcome = self.solver.check(*(z3.Bool(f"g{self._guards[text]}") for text in texts))
        if outcome == z3.sat:
            return None
        if outcome != z3.unsat:
            raise RuntimeError(f"z3 gave up: {self.solver.reason_unknown()}")
        names = {str(literal) for literal in self.solver.unsat_core()}
        return [text for text, number in self._guards.items() if f"g{number}" in names]

    def _add_exits(self) -> None:
        """Where values leave the program: per leaf the parameter's factor that a gradient follows; None for whole."""
        program, factored = self.network.factored.program, self.network.factored
        ports = {p.name: n for p, n in zip(program.inputs, program.placeholders, strict=True)}
        for port, node in zip(program.outputs, program.results, strict=True):
            if node is None or (port.role is Role.OUTPUT and not self.network.demands.whole(value_of(node))):
                continue
            value = factored.values[node]
            size = len(value.form.base)
            if port.role is Role.GRADIENT and port.name in ports:
                parameter = self._number[ports[port.name]]
                sides = self._shapes[parameter].results[0].factors
                marks = tuple((str(i),) for i in range(len(sides)))  # which leaf becomes which
                back = base_demand(value, marks).axes
                follows = tuple(self._at(parameter, sides[int(mark[0])]) if mark else None for mark in back)
                text = f"the gradient of {port.name} has the layout of {port.name}"
                self._exits.setdefault(value.key, []).append((text, follows))
                continue
            asked = "'full'" if math.isinf(self.network.demands.whole_bytes) else "'auto': it is small"
            text = f"output {port.index} is gathered whole (outputs={asked})"
            if port.role is Role.MUTATION:
                text = f"the buffer {port.name} is written in place, and so kept whole"
            elif port.role is Role.GRADIENT:
                text = f"the gradient of {port.name} is gathered whole"
            self._exits.setdefault(value.key, []).append((text, (None,) * size))

    def _at(self, op: int, factor: int | None) -> Place | None:
        return None if factor is None else Place(op, factor)

    def _reach(self) -> None:
        """Collect every fact that can follow from the demands."""
        front = [fact for demand in self.demands for fact in self._stated(demand)]
        self._cone.update(dict.fromkeys(front))
        while front:
            while front:
                fact = front.pop()
                self._axes_of.setdefault(fact.place, []).append(fact.axis)
                for place, guard in self._next(fact.place):
                    self._edges[fact.place, place] = guard
                    after = Fact(place, fact.axis)
                    if after not in self._cone:
                        self._cone[after] = fact
                        front.append(after)
            # a producer may split further, to make the order of its reader's axes possible
            for maker, reader in self._edges:
                for axis in self._axes_of.get(reader, ()):
                    more = Fact(maker, axis)
                    if more not in self._cone and maker in self._axes_of:
                        self._cone[more] = None
                        front.append(more)

    def _stated(self, demand: Demand) -> Iterator[Fact]:
        """The facts that a demand states."""
        for leaf, axes in enumerate(demand.leaves):
            place = self._factor_of(demand.key, leaf)
            yield from (Fact(place, axis) for axis in axes or () if place is not None)

    def _factor_of(self, key: Key, leaf: int) -> Place | None:
        """The factor that a leaf of a result is, in the operator that makes it."""
        number = self._number[key[0]]
        position = next(i for i, result in enumerate(self.ops[number].results) if result.key == key)
        return self._at(number, self._shapes[number].results[position].factors[leaf])

    def _leaves(self, place: Place) -> Iterator[tuple[Key, int]]:
        """The leaves of an operator's results that are this factor."""
        op = self.ops[place.op]
        for result, side in zip(op.results, self._shapes[place.op].results, strict=True):
            yield from ((result.key, i) for i, factor in enumerate(side.factors) if factor == place.factor)

    def _next(self, place: Place) -> Iterator[tuple[Place, str]]:
        """The factors to which a split propagates: those of readers, and, from a gradient, that of its parameter."""
        for key, leaf in self._leaves(place):
            for reader, operand in self._readers.get(key, ()):
                factor = self._shapes[reader].operands[operand].factors[leaf]
                if factor is not None:
                    yield Place(reader, factor), ""
            for text, follows in self._exits.get(key, ()):
                if (follower := follows[leaf]) is not None:
                    yield follower, text

    def _stops(self, place: Place) -> Iterator[str]:
        """Why no axis can split a factor."""
        op, factor = self.ops[place.op], self._shapes[place.op].factors[place.factor]
        if factor.whole and factor.size > 1:
            yield f"{_name(op)} keeps {factor.name} ({factor.size}) whole"
        for key, leaf in self._leaves(place):
            for reader, operand in self._readers.get(key, ()):
                if self._shapes[reader].operands[operand].factors[leaf] is None:
                    yield f"{_name(self.ops[reader])} reads the result of {_name(op)} whole"
            for text, follows in self._exits.get(key, ()):
                if follows[leaf] is None:
                    yield text

    def _write(self) -> None:
        """Write the clauses over all facts that were reached."""
        number = {fact: f"f{i}" for i, fact in enumerate(self._cone)}
        for demand in self.demands:
            self._write_demand(demand, number)
        for place, axes in self._axes_of.items():
            for text in self._stops(place):
                for axis in axes:
                    self._clause(self._guard(text), f"(not {number[Fact(place, axis)]})")
            for some in itertools.chain.from_iterable(itertools.combinations(axes, n) for n in (1, 2, 3)):
                self._write_size(place, tuple(some), number)
            for a, b, c in itertools.permutations(axes, 3):
                chain = (f"(not {self._major(place, a, b)})", f"(not {self._major(place, b, c)})")
                self._clause(*chain, self._major(place, a, c))
        self._write_axes(number)
        for (maker, reader), guard in self._edges.items():
            self._write_edge(maker, reader, [self._guard(guard)] if guard else [], number)

    def _write_demand(self, demand: Demand, number: dict[Fact, str]) -> None:
        guard = self._guard(demand.text)
        for leaf, axes in enumerate(demand.leaves):
            place = self._factor_of(demand.key, leaf)
            if axes is None:
                continue
            if place is None:
                if axes:
                    self._clause(guard)
                continue
            for axis in self._axes_of.get(place, ()):
                fact = number[Fact(place, axis)]
                self._clause(guard, fact if axis in axes else f"(not {fact})")
            for a, b in itertools.combinations(axes, 2):
                self._clause(guard, self._major(place, a, b))

    def _write_size(self, place: Place, axes: Axes, number: dict[Fact, str]) -> None:
        shape, mesh = self._shapes[place.op], self.network.mesh
        factor = shape.factors[place.factor]
        if len(set(map(axis_of, axes))) < len(axes):  # one axis, in two orders
            self._clause(*(f"(not {number[Fact(place, axis)]})" for axis in axes))
            return
        if factor.whole or any(splittable(shape, place.factor, way, mesh) for way in itertools.permutations(axes)):
            return
        ways, name, by = mesh.ways(axes), _name(self.ops[place.op]), ",".join(axes)
        if is_folded(axes):
            text = f"{name} does not read {factor.name} ({factor.size}) folded, as {by} would deal it out"
        elif factor.parting is not None and factor.parting.parts is not None:
            parts = sorted(factor.parting.parts)
            text = f"{name} splits {factor.name} over one axis only, into one of {parts} parts"
        elif not mesh.splits(factor.size, axes):
            text = f"{name} has {factor.size} elements along {factor.name}, fewer than the {ways} ranks of {by}"
        else:
            text = f"{name} cannot pad {factor.name}: {factor.size} elements do not divide over {ways} ranks of {by}"
        self._clause(self._guard(text), *(f"(not {number[Fact(place, axis)]})" for axis in axes))

    def _write_axes(self, number: dict[Fact, str]) -> None:
        """Write that an axis splits at most one factor of an operator, or a group that some variant splits together."""
        by_operator: dict[int, list[Place]] = {}
        for place in self._axes_of:
            by_operator.setdefault(place.op, []).append(place)
        for factors in by_operator.values():
            for one, other in itertools.combinations(factors, 2):
                if self._together(one, other):
                    continue
                for a, b in itertools.product(self._axes_of[one], self._axes_of[other]):
                    if axis_of(a) == axis_of(b):
                        self._clause(f"(not {number[Fact(one, a)]})", f"(not {number[Fact(other, b)]})")

    def _together(self, one: Place, other: Place) -> bool:
        """Whether one axis may split both of an operator's factors."""
        return any({one.factor, other.factor} <= set(group) for group in self._shapes[one.op].bundles)

    def _write_edge(self, maker: Place, reader: Place, guard: list[str], number: dict[Fact, str]) -> None:
        for a in self._axes_of[maker]:
            split = f"(not {number[Fact(maker, a)]})"
            self._clause(*guard, split, number[Fact(reader, a)])
            for b in self._axes_of[reader]:
                if a == b:
                    continue
                maker_fact, further = number.get(Fact(maker, b)), f"(not {number[Fact(reader, b)]})"
                self._clause(*guard, split, *([maker_fact] if maker_fact else []), further, self._major(reader, a, b))
                if maker_fact:
                    both = (*guard, split, f"(not {maker_fact})", f"(not {self._major(maker, a, b)})")
                    self._clause(*both, self._major(reader, a, b))

    def _guard(self, text: str) -> str:
        return f"(not g{self._guards.setdefault(text, len(self._guards))})"

    def _clause(self, *literals: str) -> None:
        self.clauses.append(f"(assert (or false {' '.join(literals)}))")

    def _major(self, place: Place, first: str, second: str) -> str:
        """The literal for `first` before `second`; each unordered pair has one boolean."""
        a, b = sorted((first, second))
        name = f"o{place.op}_{place.factor}_{a}_{b}"
        self._orders.add(name)
        return name if first == a else f"(not {name})"

    def _meeting(self, core: Sequence[str]) -> tuple[tuple[Op, ...], str]:
        """The operators on the shortest way from a demand of a core to what contradicts it, and what that is."""
        demands = [demand for demand in self.demands if demand.text in core]
        leaves = [(self._factor_of(d.key, leaf), axes) for d in demands for leaf, axes in enumerate(d.leaves)]
        fixed = {place: axes for place, axes in leaves if axes is not None}
        front = [fact for demand in demands for fact in self._stated(demand)]
        came: dict[Fact, Fact | None] = dict.fromkeys(front)
        reached: dict[int, list[Fact]] = {}
        crossed: tuple[tuple[Op, ...], str] = (), ""
        for fact in front:  # breadth first: the list grows while the loop runs
            name = self._shapes[fact.place.op].factors[fact.place.factor].name
            if any(stop in core for stop in self._stops(fact.place)):
                return self._back(fact, came), ""
            if fact.axis not in fixed.get(fact.place, (fact.axis,)):
                return self._back(fact, came), ""
            for other in reached.setdefault(fact.place.op, []):
                rival = self._shapes[other.place.op].factors[other.place.factor].name
                if (
                    axis_of(fact.axis) == axis_of(other.axis)
                    and fact.place != other.place
                    and not self._together(fact.place, other.place)
                ):
                    return self._back(fact, came), f"there {fact.axis} would split both {rival} and {name}"
                if fact.place == other.place and not crossed[0]:
                    crossed = self._back(fact, came), f"there {other.axis} and {fact.axis} would both split {name}"
            reached[fact.place.op].append(fact)
            for place, _ in self._next(fact.place):
                after = Fact(place, fact.axis)
                if after not in came:
                    came[after] = fact
                    front.append(after)
        return crossed

    def _back(self, fact: Fact | None, came: dict[Fact, Fact | None]) -> tuple[Op, ...]:
        operators: list[Op] = []
        while fact is not None:
            operators.append(self.ops[fact.place.op])
            fact = came[fact]
        return tuple(reversed(operators))


def _name(op: Op) -> str:
    """`aten.sort.default at model.py:7`: an operator by its line, so that repeated layers give one text."""
    if op.node.op == "placeholder":
        return op.node.name
    source = origin_of(op.node).source
    return f"{op.node.target} at {source}" if source else str(op.node.target)


def in_words(constraint: Constraint) -> str:
    """A constraint as the user wrote it. One text may name many values: those of every layer, or of a line of code that
    runs several times."""
    node, spec = constraint.key[0], constraint.text
    if node.op == "placeholder":
        return f"{constraint.label.partition(' on ')[0]} = {spec}"
    return f"constrain(..., {spec}) at {origin_of(node).source or where(node)}"
