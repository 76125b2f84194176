"""Stitch: fill the hole that skipped layers left in a program with copies of their representative.

Two periods of layers ran before the hole: units 1 and 2. If both are the same nodes, linked to their neighbours in the
same way, the units in the hole are more of the same:

    %a = mm(%h, %p1)         # unit 1                  %a = mm(%h, %p1)
    %b = mm(%a, %p2)         # unit 2                  %b = mm(%a, %p2)
    %s = skipped(%b)         # the hole          ->    %c = mm(%b, %p3);  %d = mm(%c, %p4)
    %e = mm(%s, %p5)                                   %e = mm(%d, %p5)

The backward is filled in likewise; there unit 2 follows the hole. Where a check fails, Unlike is raised, and the model
is traced in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from shardc.capture import canonical
from shardc.capture.repeated_layers import Repeat, Unlike
from shardc.ir.facts import Captured, Origin, describe, origin, origin_of
from shardc.ir.program import Program, Role, call, value_of
from shardc.ir.versions import GraphVersion


def fill(program: Program, number: int, repeat: Repeat) -> Program:
    """The program with the hole of one repeat filled. Raises Unlike where the units differ."""
    return _Stitch(program, number, repeat).run()


class _From(Enum):
    """In which unit an operand is made, counted from the unit that reads it."""

    SAME = 0
    BEFORE = -1
    AFTER = 1


class _Link(NamedTuple):
    """An operand: node number `position` of the same unit or of a neighbour."""

    source: _From
    position: int


class _Of(NamedTuple):
    """An operand: a parameter or buffer of one of the unit's layers."""

    layer: int
    role: Role
    name: str


@dataclass(frozen=True)
class _Units:
    """Units 1 and 2 node by node, first their forward, then their backward; and what stands in the hole."""

    one: list[fx.Node]
    two: list[fx.Node]
    forward: int
    exits: list[fx.Node]
    entries: list[fx.Node]


class _Stitch:
    def __init__(self, program: Program, number: int, repeat: Repeat) -> None:
        self.program, self.number, self.repeat = program, number, repeat
        self.child = {path: index for index, path in enumerate(repeat.paths)}
        self.depth = repeat.paths[0].count(".") + 1
        ports = zip(program.inputs, program.placeholders, strict=True)
        self.ports = {(port.role, port.name): node for port, node in ports}
        self.owned = {
            node: (*place, role)
            for (role, name), node in self.ports.items()
            if role in (Role.PARAMETER, Role.BUFFER) and (place := self._place(name))
        }
        self.units = self._units()
        self.at = [{node: i for i, node in enumerate(unit)} for unit in (self.units.one, self.units.two)]
        self.start: dict[int, fx.Node] = {}
        """By position: what the last unit in the hole reads where the others read that node of the unit after them."""
        self.from_before: set[int] = set()
        """The positions that a unit reads from the unit before it."""
        self.template = [self._node(*pair) for pair in zip(self.units.one, self.units.two, strict=True)]
        self._check_uses()

    def _place(self, path: str) -> tuple[int, str] | None:
        """The child to which a module or parameter belongs, and its path within; None for others."""
        parts = path.split(".")
        index = self.child.get(".".join(parts[: self.depth]))
        return None if index is None else (index, ".".join(parts[self.depth :]))

    # --- the units and the hole

    def _units(self) -> _Units:
        calls = [node for node in self.program.graph.nodes if node.op == "call_function"]
        target = torch.ops.shardc.skipped.default
        hole = [i for i, node in enumerate(calls) if node.target is target and node.args[1] == self.number]
        if any(not calls[i].args[2] for i in hole):
            raise Unlike("the program uses what a layer within returns elsewhere than in the next layer")
        exits = [i for i in hole if origin_of(calls[i]).phase == "forward"]
        entries = [i for i in hole if origin_of(calls[i]).phase == "backward"]
        if not exits or any(run[-1] - run[0] + 1 != len(run) for run in (exits, entries) if run):
            raise Unlike("the program computes something between the layers")
        owner = [self._place(origin_of(node).module) for node in calls]
        layers = range(self.repeat.start, self.repeat.hole.start)
        middle, end = self.repeat.start + self.repeat.period, exits[0]
        mine = [i for i, place in enumerate(owner) if place and place[0] in layers and i not in hole]
        forward = [i for i in mine if i < end]
        second = [i for i in forward if owner[i][0] >= middle]  # type: ignore[index]
        backward = [i for i in mine if entries and i > entries[-1]]
        if not second or len(forward) + len(backward) != len(mine):
            raise Unlike("the layers' operators do not stand together")
        one, two = calls[forward[0] : second[0]], calls[second[0] : end]
        count = len(one)
        if backward:
            behind = calls[entries[-1] + 1 : backward[-1] + 1]
            half = len(behind) // 2
            one, two = one + behind[half:], two + behind[:half]
        if len(one) != len(two) or count != end - second[0]:
            raise Unlike("the layers differ in length")
        return _Units(one, two, count, [calls[i] for i in exits], [calls[i] for i in entries])

    # --- what a unit is made of: arguments of every node, with links in place of nodes

    def _node(self, one: fx.Node, two: fx.Node) -> tuple[list[tuple[Any, bool]], dict[str, tuple[Any, bool]]]:
        """Positional and keyword arguments, each with whether it is the same in every unit."""
        same = (
            one.target is two.target
            and origin_of(one).phase == origin_of(two).phase
            and origin_of(one).source == origin_of(two).source
            and self._shifted(origin_of(one).module) == origin_of(two).module
            and _form(value_of(one)) == _form(value_of(two))
        )
        if not same:
            raise Unlike(f"{one} and {two} differ")
        args, kwargs = self._argument(one.args, two.args), self._argument(one.kwargs, two.kwargs)
        return [(arg, _fixed(arg)) for arg in args], {key: (arg, _fixed(arg)) for key, arg in kwargs.items()}

    def _shifted(self, path: str, units: int = 1) -> str:
        """The same place in a later unit."""
        place = self._place(path)
        if place is None or place[0] not in range(self.repeat.start - 1, self.repeat.stop):
            return path
        index = place[0] + units * self.repeat.period
        return ".".join(filter(None, (self.repeat.paths[index], place[1]))) if index < len(self.repeat.paths) else ""

    def _argument(self, one: Any, two: Any) -> Any:
        if isinstance(one, fx.Node) and isinstance(two, fx.Node):
            return self._operand(one, two)
        if type(one) is not type(two):
            raise Unlike(f"an argument is {one} in one layer and {two} in the next")
        if isinstance(one, dict):
            if list(one) != list(two):
                raise Unlike("arguments differ")
            return {key: self._argument(one[key], two[key]) for key in one}
        if isinstance(one, (list, tuple)):
            if len(one) != len(two):
                raise Unlike("arguments differ")
            items = [self._argument(a, b) for a, b in zip(one, two, strict=True)]
            return tuple(items) if isinstance(one, tuple) else items
        if isinstance(one, slice):
            return slice(*(self._argument(getattr(one, k), getattr(two, k)) for k in ("start", "stop", "step")))
        if one != two:
            raise Unlike(f"an argument is {one} in one layer and {two} in the next")
        return one

    def _operand(self, one: fx.Node, two: fx.Node) -> fx.Node | _Link | _Of:
        first, second = self.at
        if one in first:
            if second.get(two) == first[one]:
                return _Link(_From.SAME, first[one])
        elif one is two:
            if not any(one in nodes for nodes in (second, self.units.exits, self.units.entries, self.owned)):
                return one
        elif one in self.owned and two in self.owned:
            (i, name, role), (j, other, other_role) = self.owned[one], self.owned[two]
            if (i + self.repeat.period, name, role) == (j, other, other_role) and i in self._layers(1):
                return _Of(j, role, name)
        elif two in first and one not in second:
            self.from_before.add(first[two])
            return _Link(_From.BEFORE, first[two])
        elif one in second and two not in first and two not in second and two not in self.units.exits:
            return self._after(second[one], two)
        raise Unlike(f"{one} and {two} are used alike, but come from elsewhere")

    def _layers(self, unit: int) -> range:
        first = self.repeat.start + (unit - 1) * self.repeat.period
        return range(first, first + self.repeat.period)

    def _after(self, position: int, seen: fx.Node) -> _Link:
        """The link to what unit 1 reads of unit 2, at a place where unit 2 reads `seen`, which is in the hole or
        beyond."""
        start: Any = seen
        if seen in self.units.entries:
            start, model = seen.args[0], self.units.two[position]
            if start.target is not model.target or _form(value_of(start)) != _form(value_of(model)):
                raise Unlike("the layer after the hole returns another gradient")
        if self.start.setdefault(position, start) is not start:
            raise Unlike("the layers are linked in different ways")
        return _Link(_From.AFTER, position)

    def _check_uses(self) -> None:
        """Raise Unlike where a unit is read otherwise than by the links."""
        first, second = self.at
        roots = {second.get(node.args[0]) for node in self.units.exits}  # type: ignore[arg-type]
        if roots != self.from_before:
            raise Unlike("the layers hand on something else than what they return")
        if any(user not in second for node in self.units.entries for user in node.users):
            raise Unlike("a gradient is used beyond its layer")
        inside = {*first, *second, *self.units.exits, self.program.graph.output_node()}
        for position, (one, two) in enumerate(zip(self.units.one, self.units.two, strict=True)):
            if any(user not in inside for user in two.users):
                raise Unlike(f"{two} is used beyond its layer")
            if position not in self.start and any(user not in inside for user in one.users):
                raise Unlike(f"{one} is used beyond its layer")

    # --- the program without a hole

    def run(self) -> Program:
        """The program without a hole."""
        results = self._gradients()
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        copies: dict[tuple[int, int], fx.Node] = {}
        forward, backward = range(self.units.forward), range(self.units.forward, len(self.units.two))
        hole = range(3, self.repeat.units + 1)

        def operand(link: _Link | _Of, unit: int) -> fx.Node:
            if isinstance(link, _Of):
                path = self.repeat.paths[link.layer + (unit - 2) * self.repeat.period]
                return env[self.ports[link.role, f"{path}.{link.name}"]]
            if link.source is _From.AFTER and unit == self.repeat.units:
                return env[self.start[link.position]]
            return copies[unit + link.source.value, link.position]

        def emit(unit: int, positions: range) -> None:
            @cache
            def place(old: Origin) -> Origin:
                return origin(self._shifted(old.module, unit - 2), old.source, old.phase)

            for position in positions:
                old, (args, kwargs) = self.units.two[position], self.template[position]
                args = [arg if fixed else filled(arg, unit) for arg, fixed in args]
                kwargs = {key: arg if fixed else filled(arg, unit) for key, (arg, fixed) in kwargs.items()}
                new = copies[unit, position] = call(graph, old.target, tuple(args), kwargs)
                describe(new, Captured(value_of(old), place(origin_of(old))))

        def filled(tree: Any, unit: int) -> Any:
            return _filled(tree, lambda link: operand(link, unit), env.__getitem__)

        for old in self.program.graph.nodes:
            if old.op == "placeholder":
                env[old] = canonical.placeholder(graph, old.name)
                env[old].meta = dict(old.meta)
            elif old in self.units.exits:
                if old is self.units.exits[0]:
                    for unit in hole:
                        emit(unit, forward)
                env[old] = copies[hole[-1], self.at[1][old.args[0]]]
            elif old in self.units.entries:
                if old is self.units.entries[0]:
                    for unit in reversed(hole):
                        emit(unit, backward)
            elif old in self.at[1]:
                emit(2, range(self.at[1][old], self.at[1][old] + 1))
                env[old] = copies[2, self.at[1][old]]
            elif old.op == "call_function":
                args, kwargs = fx.map_arg((old.args, dict(old.kwargs)), env.__getitem__)
                env[old] = call(graph, old.target, args, kwargs)
                env[old].meta = dict(old.meta)
                if old in self.at[0]:
                    copies[1, self.at[0][old]] = env[old]
        graph.output(tuple(copies[r] if isinstance(r, tuple) else None if r is None else env[r] for r in results))
        return replace(self.program, version=GraphVersion.of(graph))

    def _gradients(self) -> list[fx.Node | tuple[int, int] | None]:
        """The results of the new program: nodes of the old one; for gradients in the hole, unit and position."""
        old_results = dict(zip(self.program.outputs, self.program.results, strict=True))
        results: list[fx.Node | tuple[int, int] | None] = []
        for port, value in old_results.items():
            place = self._place(port.name) if port.role is Role.GRADIENT else None
            if place is None or place[0] not in range(self.repeat.start, self.repeat.hole.stop):
                if value in self.at[1] or (value in self.at[0] and self.at[0][value] not in self.start):
                    raise Unlike(f"{value} is a result of the program")
                results.append(value)
                continue
            unit, within = divmod(place[0] - self.repeat.start, self.repeat.period)
            one, two = (
                old_results[replace(port, name=f"{self.repeat.paths[self._layers(u)[within]]}.{place[1]}")]
                for u in (1, 2)
            )
            position = None if one is None else self.at[0].get(one, -1)
            if position != (None if two is None else self.at[1].get(two)):
                raise Unlike(f"the gradient of {port.name} comes from elsewhere")
            if unit < 2:
                results.append(value)
            elif value is not None:
                raise Unlike(f"{port.name} is used elsewhere than in its layer")
            else:
                results.append(None if position is None else (unit + 1, position))
        return results


def _fixed(tree: Any) -> bool:
    """Whether an argument is the same in every unit."""
    variable_parts: list[object] = []
    _filled(tree, variable_parts.append, variable_parts.append)  # type: ignore[arg-type]
    return not variable_parts


def _filled(tree: Any, link: Callable[[_Link | _Of], fx.Node], node: Callable[[fx.Node], fx.Node]) -> Any:
    """A node's arguments, from those of the template."""
    if isinstance(tree, (_Link, _Of)):
        return link(tree)
    if isinstance(tree, fx.Node):
        return node(tree)
    if type(tree) in (tuple, list):
        return type(tree)([_filled(item, link, node) for item in tree])
    if type(tree) is dict:
        return {key: _filled(item, link, node) for key, item in tree.items()}
    if type(tree) is slice:
        return slice(*(_filled(getattr(tree, k), link, node) for k in ("start", "stop", "step")))
    return tree


def _form(value: Any) -> Any:
    """What a value's shape, strides and type are."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.requires_grad
    return tuple(map(_form, value)) if isinstance(value, (tuple, list)) else value
