"""What cannot hold together unless a split dim is gathered or moved: minimal sets of demands and limits, by z3.

Conversions make every set of layouts possible, at a price. So the question is what a program would be without them: a
reader of a value that is split must split the same dim by the same axes, major to minor, and may split it further.
What is whole may be sliced, and partial sums may be reduced: that is no conversion of a split. One boolean says that an
operator's factor is split by an axis, one that of two axes the first is major:

    maker's factor split by a            =>  reader's factor split by a, and nothing major to it that the maker lacks
    two factors of an operator           =>  not both split by a
    a demand (assumption)                =>  its dims are split by exactly these axes, in this order
    a limit of an operator (assumption)  =>  its factor is not split by these axes

Splits start at demands and run along readers, so only the booleans that can be reached from there enter the model: all
others are false in some solution if there is any. z3's core of assumptions is thinned by deletion, so that removing any
one member leaves the others feasible. A memory budget has its place here as one more assumption, that bounds the sum of
what is not split.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import z3

from shardc.ir.facts import origin_of
from shardc.ir.program import Role
from shardc.planning.cost_network import CostNetwork, base_demand
from shardc.rules.factors.factored import Key, Op
from shardc.rules.factors.strategy import Shape, splittable

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
    """What was asked of a base value, under the words `text`: per leaf exactly these axes, None where it is open."""

    text: str
    key: Key
    leaves: tuple[Axes | None, ...]


@dataclass(frozen=True)
class FoundConflict:
    """Demands and limits, by their texts, that cannot hold together; the operators that carry a demand's split to where
    it meets the others, and what is wrong there, if the members do not say it."""

    members: tuple[str, ...]
    path: tuple[Op, ...]
    reason: str


@dataclass(eq=False)
class ConflictFinder:
    """The model of one program under some demands. Outputs and written buffers are whole where the network says so."""

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
        self._held: dict[Place, list[str]] = {}
        self._orders: set[str] = set()
        self._reach()
        self._write()
        self.solver = z3.SolverFor("QF_FD")
        names = [f"f{i}" for i in range(len(self._cone))] + [f"g{i}" for i in range(len(self._guards))]
        names += sorted(self._orders)
        declared = [f"(declare-const {name} Bool)" for name in names]
        self.solver.from_string("\n".join([*declared, *self.clauses]))

    def found(self, most: int = 20) -> list[FoundConflict]:
        """Minimal clashes, no two with a demand in common; the user's demands in every one."""
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
        """Where values leave the program: per leaf the place of the parameter that a gradient follows; None: whole."""
        program, factored = self.network.factored.program, self.network.factored
        ports = {p.name: n for p, n in zip(program.inputs, program.placeholders, strict=True)}
        for port, node in zip(program.outputs, program.results, strict=True):
            if node is None or (port.role is Role.OUTPUT and not self.network.whole_outputs):
                continue
            value = factored.values[node]
            size = len(value.form.base)
            if port.role is Role.GRADIENT and port.name in ports:
                parameter = self._number[ports[port.name]]
                sides = self._shapes[parameter].results[0].factors
                marks = tuple((str(i),) for i in range(len(sides)))  # which leaf becomes which
                back = base_demand(value, marks).axes
                follows = tuple(self._at(parameter, sides[int(mark[0])]) if mark else None for mark in back)
                text = f"the gradient of {port.name} lies as {port.name} does"
                self._exits.setdefault(value.key, []).append((text, follows))
                continue
            what = f"output {port.index} is gathered whole (outputs='full')"
            if port.role is Role.MUTATION:
                what = f"the buffer {port.name} is written in place, and so kept whole"
            elif port.role is Role.GRADIENT:
                what = f"the gradient of {port.name} is gathered whole"
            self._exits.setdefault(value.key, []).append((what, (None,) * size))

    def _at(self, op: int, factor: int | None) -> Place | None:
        return None if factor is None else Place(op, factor)

    def _reach(self) -> None:
        """Every fact to which the demands' splits can lead."""
        front = [fact for demand in self.demands for fact in self._asked(demand)]
        self._cone.update(dict.fromkeys(front))
        while front:
            while front:
                fact = front.pop()
                self._held.setdefault(fact.place, []).append(fact.axis)
                for place, guard in self._next(fact.place):
                    self._edges[fact.place, place] = guard
                    after = Fact(place, fact.axis)
                    if after not in self._cone:
                        self._cone[after] = fact
                        front.append(after)
            # a maker may split further, so that the order of its reader's axes becomes possible
            for maker, reader in self._edges:
                for axis in self._held.get(reader, ()):
                    more = Fact(maker, axis)
                    if more not in self._cone and maker in self._held:
                        self._cone[more] = None
                        front.append(more)

    def _asked(self, demand: Demand) -> Iterator[Fact]:
        """The facts that a demand asks for."""
        for leaf, axes in enumerate(demand.leaves):
            place = self._made(demand.key, leaf)
            yield from (Fact(place, axis) for axis in axes or () if place is not None)

    def _made(self, key: Key, leaf: int) -> Place | None:
        """The factor of the maker that a leaf of its result is."""
        number = self._number[key[0]]
        position = next(i for i, result in enumerate(self.ops[number].results) if result.key == key)
        return self._at(number, self._shapes[number].results[position].factors[leaf])

    def _leaves(self, place: Place) -> Iterator[tuple[Key, int]]:
        """The leaves of results that a factor is."""
        op = self.ops[place.op]
        for result, side in zip(op.results, self._shapes[place.op].results, strict=True):
            yield from ((result.key, i) for i, factor in enumerate(side.factors) if factor == place.factor)

    def _next(self, place: Place) -> Iterator[tuple[Place, str]]:
        """Where a split must go on: the readers' factors, and the parameter of which the value is the gradient."""
        for key, leaf in self._leaves(place):
            for reader, operand in self._readers.get(key, ()):
                factor = self._shapes[reader].operands[operand].factors[leaf]
                if factor is not None:
                    yield Place(reader, factor), ""
            for text, follows in self._exits.get(key, ()):
                if (follower := follows[leaf]) is not None:
                    yield follower, text

    def _stops(self, place: Place) -> Iterator[str]:
        """Why a factor cannot be split at all, by whatever axis."""
        op, factor = self.ops[place.op], self._shapes[place.op].factors[place.factor]
        if factor.whole and factor.size > 1:
            yield f"{_name(op)} keeps {factor.name} ({factor.size}) whole"
        for key, leaf in self._leaves(place):
            for reader, operand in self._readers.get(key, ()):
                if self._shapes[reader].operands[operand].factors[leaf] is None:
                    yield f"{_name(self.ops[reader])} reads whole what {_name(op)} makes"
            for text, follows in self._exits.get(key, ()):
                if follows[leaf] is None:
                    yield text

    def _write(self) -> None:
        """The clauses over all facts of the cone."""
        number = {fact: f"f{i}" for i, fact in enumerate(self._cone)}
        for demand in self.demands:
            self._write_demand(demand, number)
        for place, axes in self._held.items():
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
            place = self._made(demand.key, leaf)
            if axes is None:
                continue
            if place is None:
                if axes:
                    self._clause(guard)
                continue
            for axis in self._held.get(place, ()):
                fact = number[Fact(place, axis)]
                self._clause(guard, fact if axis in axes else f"(not {fact})")
            for a, b in itertools.combinations(axes, 2):
                self._clause(guard, self._major(place, a, b))

    def _write_size(self, place: Place, axes: Axes, number: dict[Fact, str]) -> None:
        shape, mesh = self._shapes[place.op], self.network.mesh
        factor = shape.factors[place.factor]
        if factor.whole or any(splittable(shape, place.factor, way, mesh) for way in itertools.permutations(axes)):
            return
        ways, name, by = mesh.ways(axes), _name(self.ops[place.op]), ",".join(axes)
        if factor.parting is not None and factor.parting.parts is not None:
            parts = sorted(factor.parting.parts)
            text = f"{name} splits {factor.name} over one axis only, into one of {parts} parts"
        elif not mesh.splits(factor.size, axes):
            text = f"{name} has {factor.size} elements along {factor.name}, fewer than the {ways} ranks of {by}"
        else:
            text = f"{name} cannot pad {factor.name}: {factor.size} elements do not divide over {ways} ranks of {by}"
        self._clause(self._guard(text), *(f"(not {number[Fact(place, axis)]})" for axis in axes))

    def _write_axes(self, number: dict[Fact, str]) -> None:
        """An axis splits one factor of an operator at most, or a group that some variant splits together."""
        places: dict[int, list[Place]] = {}
        for place in self._held:
            places.setdefault(place.op, []).append(place)
        for factors in places.values():
            for one, other in itertools.combinations(factors, 2):
                if self._together(one, other):
                    continue
                for axis in set(self._held[one]) & set(self._held[other]):
                    self._clause(f"(not {number[Fact(one, axis)]})", f"(not {number[Fact(other, axis)]})")

    def _together(self, one: Place, other: Place) -> bool:
        """Whether one axis may split both of an operator's factors."""
        return any({one.factor, other.factor} <= set(group) for group in self._shapes[one.op].bundles)

    def _write_edge(self, maker: Place, reader: Place, guard: list[str], number: dict[Fact, str]) -> None:
        for a in self._held[maker]:
            split = f"(not {number[Fact(maker, a)]})"
            self._clause(*guard, split, number[Fact(reader, a)])
            for b in self._held[reader]:
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
        """`first` stands before `second`, as one boolean per unordered pair."""
        a, b = sorted((first, second))
        name = f"o{place.op}_{place.factor}_{a}_{b}"
        self._orders.add(name)
        return name if first == a else f"(not {name})"

    def _meeting(self, core: Sequence[str]) -> tuple[tuple[Op, ...], str]:
        """Where the splits of a core's demands meet what stands against them: the nearest place, and what it is."""
        demands = [demand for demand in self.demands if demand.text in core]
        leaves = [(self._made(d.key, leaf), axes) for d in demands for leaf, axes in enumerate(d.leaves)]
        fixed = {place: axes for place, axes in leaves if axes is not None}
        front = [fact for demand in demands for fact in self._asked(demand)]
        came: dict[Fact, Fact | None] = dict.fromkeys(front)
        reached: dict[int, list[Fact]] = {}
        crossed: tuple[tuple[Op, ...], str] = (), ""
        for fact in front:  # breadth first: it grows as it runs
            name = self._shapes[fact.place.op].factors[fact.place.factor].name
            if any(stop in core for stop in self._stops(fact.place)):
                return self._back(fact, came), ""
            if fact.axis not in fixed.get(fact.place, (fact.axis,)):
                return self._back(fact, came), ""
            for other in reached.setdefault(fact.place.op, []):
                rival = self._shapes[other.place.op].factors[other.place.factor].name
                if (
                    fact.axis == other.axis
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
    """`aten.sort.default at model.py:7`: an operator by its line, so that repeated layers are one."""
    if op.node.op == "placeholder":
        return op.node.name
    source = origin_of(op.node).source
    return f"{op.node.target} at {source}" if source else str(op.node.target)
