"""Straight lines of a function: calls with the names of what they read and make, the user's module above them, and what
is deleted behind them."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from shardc.analysis.operands import collective_of
from shardc.analysis.timeline import is_started
from shardc.ir.facts import FACTS, Captured, dtype_of, lowered
from shardc.ir.layout import SHORT_DTYPES
from shardc.ir.mesh import Mesh
from shardc.ir.program import value_of
from shardc.rules.factors.chosen import chosen_of
from shardc.runtime.collectives.bucket import Bucket
from shardc.runtime.collectives.collective import wait
from shardc.source.calls import CallTexts, is_view, may_write
from shardc.source.frees import Holding
from shardc.source.naming import Naming, Scope
from shardc.source.places import Spot, spread
from shardc.source.repetition import operands_of
from shardc.source.text import Item, fits, listed, remark, tuple_of, values, written

LEAST_LIST = 6
"""Results of one call that are not named one by one, but stand in a list."""

LEAST_ALIKE = 3
MOST_LISTED = 64
"""Views, or waits, of values in lists that are one statement, at least; and the columns that it takes to say of which
values, at most."""


AHEAD = 64
"""Calls whose lines are told together, at most."""


class NoPlace(Exception):
    """A value is read that its function does not have: the layers are not written as functions."""


class Shared:
    """What all functions of a module share. `told` is what is known of a collective, for a comment; `held` what every
    value occupies."""

    def __init__(
        self,
        calls: CallTexts,
        naming: Naming,
        mesh: Mesh,
        taken: set[str],
        told: Callable[[fx.Node], str],
        held: Holding | None,
    ) -> None:
        self.calls, self.naming, self.mesh, self.taken, self.told, self.held = calls, naming, mesh, taken, told, held
        self.used: set[str] = set()
        """What else is imported."""

    def typed(self, node: fx.Node) -> str:
        """`f32[32@dp, 64]`: dtype and layout of a value."""
        layout = lowered(node).layout
        return "" if layout is None else f"{SHORT_DTYPES[dtype_of(node)]}{layout.simplify(self.mesh)}"

    def only_views(self, node: fx.Node) -> bool:
        """Whether a view lies in the memory of what it views."""
        return self.held is None or self.held.of(node) == self.held.of(node.all_input_nodes[0])

    def annotation(self, node: fx.Node) -> str:
        """The Python type of a value."""
        if node.op == "call_function" and any(user.target is wait for user in node.users):
            self.used.add("Started")
            return "Started[list[Tensor]]" if isinstance(node.target, Bucket) else "Started[Tensor]"
        return "Tensor" if lowered(node).layout is not None else "Sequence[Tensor]"

    def list_of(self, nodes: Iterable[fx.Node]) -> str:
        """The Python type of a list of values."""
        kinds = dict.fromkeys(map(self.annotation, nodes))
        return f"list[{' | '.join(kinds) or 'Tensor'}]"


class Writer:
    """Writes the lines of one function, statement by statement. `nodes` are those that it calls; `layer` says that it
    is the function of a repeated layer."""

    def __init__(self, shared: Shared, nodes: Collection[fx.Node], layer: bool) -> None:
        self.shared, self.here, self.layer = shared, set(nodes), layer
        self.scope = Scope(shared.taken)
        self.where: dict[fx.Node, Spot] = {}
        self.wanted: dict[fx.Node, str] = {}
        """What values are called that are not called by their module."""
        self.level = 1
        self._blocks: list[list[str]] = [[]]
        self._owned: dict[str, fx.Node | str] = {}
        self._touched: dict[str, int] = {}
        self._module: str | None = None
        self._nested: dict[fx.Node, Callable[[], Spot]] = {}
        """Views that stand within the statement that reads them, and where what they view is."""
        self._untold: dict[fx.Node, str] = {}
        """What is told of a collective where it is awaited."""

    def begin(self) -> None:
        """What follows is another statement."""
        self._blocks.append([])

    def own(self, name: str, what: fx.Node | str) -> None:
        """The function may free what is called so."""
        self._owned[name] = what
        self._touched[name] = len(self._blocks) - 1

    def name(self, node: fx.Node, wanted: str = "") -> Spot:
        """Give a value of the function's own a name."""
        wanted = wanted or self.wanted.get(node) or self.shared.naming.of(node, self.layer)
        self.where[node] = Spot(self.scope.name(wanted))
        self.own(self.where[node].name, node)
        return self.where[node]

    def read(self, place: Spot) -> Spot:
        """A value is read here."""
        self._touched[place.name] = len(self._blocks) - 1
        return place

    def place(self, node: fx.Node) -> Spot:
        """Where a value is that is read here. One of several results that has no name is taken out, and a view that
        has none is made."""
        if node in self._nested:
            return Spot("".join(map(str, self.shared.calls.parts(node, [self._nested[node]()], False))))
        if node not in self.where and node.target is operator.getitem:
            source, index = node.args
            return self.read(Spot(self.where[source].name, index))  # type: ignore[index, arg-type]
        if node not in self.where:
            raise NoPlace(node.name)
        return self.read(self.where[node])

    def add(self, *parts: Item, comment: str = "") -> None:
        """Lines of the statement."""
        self._blocks[-1] += written(parts, self.level, comment)

    def remark(self, text: str) -> None:
        """A comment on lines of its own."""
        self._blocks[-1] += remark(text, self.level)

    def lines(self, left: Iterable[fx.Node | str], dropped: Collection[fx.Node | str] | None) -> list[str]:
        """All lines. What is neither `left` to the caller, nor read by the last statement, is deleted behind its last
        reader if it is among `dropped`; None stands for all."""
        stays, last = set(left), len(self._blocks) - 1
        gone: dict[int, list[str]] = {}
        for name, number in self._touched.items():
            what = self._owned.get(name)
            if what is not None and what not in stays and number < last and (dropped is None or what in dropped):
                gone.setdefault(number, []).append(name)
        for number, names in gone.items():
            self._blocks[number] += written(["del ", tuple_of(sorted(names))], 1)
        return [line for block in self._blocks for line in block]

    def nest(self, node: fx.Node, viewed: Callable[[], Spot]) -> bool:
        """Let a view stand within the statement that reads it, if only one does, and if it holds no memory of its own.
        `viewed` says where what it views is, then."""
        if not is_view(node) or len(node.users) != 1:
            return False
        (reader,) = node.users
        nests = reader in self.here and operands_of(reader).count(node) == 1 and self.shared.only_views(node)
        if nests:
            self._nested[node] = viewed
        return nests

    def call(self, node: fx.Node, operands: Callable[[], Sequence[Spot]], own: bool) -> None:
        """The statement of a call; above it the views that it reads and that do not fit into its line. `own` says that
        its first operand is the function's own and dies here."""

        def parts() -> list[Item]:
            return [*targets, " = ", *self.shared.calls.parts(node, operands(), may_write(node, own))]

        nested = [operand for operand in dict.fromkeys(operands_of(node)) if operand in self._nested]
        targets = self._targets(node)
        for view in nested:
            if fits(parts(), self.level):
                break
            viewed = self._nested.pop(view)
            self.call(view, lambda viewed=viewed: [viewed()], False)
        statement = parts()
        self.add(*statement, comment=self._comment(node, statement))
        for view in nested:
            self._nested.pop(view, None)

    def _comment(self, node: fx.Node, statement: Sequence[Item]) -> str:
        """The type of a value, and what is told of a collective. Where a collective is started no type is told, and
        what it sends stands where it is awaited, if it does not fit into the line. A type that does not fit is told if
        axes split or sum otherwise than in the first operand."""
        typed, told = self.shared.typed(node), self.shared.told(node)
        if is_started(node):
            if told and not fits([*statement, "  # ", told], self.level):
                self._untold[node] = told
                return ""
            return told
        started = node.args[0] if node.target is wait else None
        if isinstance(started, fx.Node) and started in self._untold:
            told = self._untold.pop(started)
        comment = "; ".join(text for text in (typed, told) if text)
        plain = not told and collective_of(node) is None and started is None
        if plain and not fits([*statement, "  # ", comment], self.level) and node.all_input_nodes:
            return "" if self._spread(node) == self._spread(node.all_input_nodes[0]) else comment
        return comment

    def _spread(self, node: fx.Node) -> Sequence[str]:
        """The axes that split a value, and over which it is to be summed: `(dp,tp)`, `+sum@tp`."""
        return sorted(re.findall(r"@\(.*?\)|\+?\w*@\w+", self.shared.typed(node)))

    def each(self, nodes: Sequence[fx.Node], wanted: str) -> None:
        """One statement for equal views of values in lists, or for collectives there that are awaited."""
        places = {node: self.place(node.all_input_nodes[0]) for node in nodes}
        ordered = sorted(nodes, key=lambda node: places[node].at or 0) if _in_a_row(places.values()) else list(nodes)
        whole = self.scope.name(wanted)
        self.own(whole, whole)
        for index, node in enumerate(ordered):
            self.where[node] = Spot(whole, index, len(ordered))
        items = spread([places[node] for node in ordered])
        source: Item = str(items[0]).removeprefix("*") if len(items) == 1 else listed(items)
        typed = {self.shared.typed(node) for node in nodes}
        made = self.shared.calls.parts(ordered[0], [Spot("x")], False)
        text = "".join(map(str, made))
        comment = typed.pop() if len(typed) == 1 else ""
        self.add(f"{whole} = [{text} for x in ", source, "]", comment=comment)

    def _targets(self, node: fx.Node) -> list[Item]:
        pieces = unpacked(node, self.here)
        if not pieces:
            return [str(self.name(node))]
        if len(pieces) < LEAST_LIST:
            return [values([str(self.name(piece)) for piece in pieces], bare=len(pieces) > 1)]
        whole = self.name(node)
        self.own(whole.name, whole.name)
        for index, piece in enumerate(pieces):
            self.where[piece] = Spot(whole.name, index, len(pieces))
        return [str(whole)]

    def header(self, node: fx.Node, following: Iterable[fx.Node]) -> None:
        """Name the user's module above the calls that come from it, with its lines. `following` begins at `node`. What
        runs beside the calls has a name that says where it is from."""
        module = lowered(node).origin.module
        if module == self._module or _beside(node):
            return
        following = list(itertools.islice(itertools.filterfalse(_beside, following), AHEAD))
        if is_view(node) and all(is_view(one) or lowered(one).origin.module != module for one in following):
            return
        self._module = module
        mine: list[fx.Node] = []
        for one in following:
            if lowered(one).origin.module != module:
                break
            mine.append(one)
        below = re.sub(r"^.*?\.\d+(\.|$)", "", module) if self.layer else module
        text = ", ".join(part for part in (below, _sources(mine)) if part)
        if text:
            self.remark(text)


def _in_a_row(places: Collection[Spot]) -> bool:
    """Whether places are all that lie between the first and the last of them in one list."""
    numbers = sorted(place.at or 0 for place in places) or [0]
    return len({place.name for place in places}) == 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _beside(node: fx.Node) -> bool:
    """Whether a call starts a collective, or awaits one."""
    return node.target is wait or is_started(node)


def unpacked(node: fx.Node, here: Collection[fx.Node]) -> list[fx.Node]:
    """The results of a call that has several, if each is taken out once, `here`; then all get names where the call is
    made."""
    if lowered(node).layout is not None:
        return []
    if any(user.target is not operator.getitem or user not in here for user in node.users):
        return []
    pieces = sorted(node.users, key=lambda user: user.args[1])  # type: ignore[arg-type, return-value]
    indices = [piece.args[1] for piece in pieces]
    return pieces if pieces and indices == list(range(_results(node))) else []


def _results(node: fx.Node) -> int:
    """How many results a call has; -1 if that is not known."""
    source = node.args[0] if node.target is wait else node
    if isinstance(source, fx.Node) and isinstance(source.target, Bucket):
        return len(source.all_input_nodes)
    chosen = chosen_of(node)
    if chosen is not None and isinstance(chosen.op.node.meta.get(FACTS), Captured):
        made = value_of(chosen.op.node)
        return len(made) if isinstance(made, (tuple, list)) else -1
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload) and not any("[]" in str(one.type) for one in target._schema.returns):
        return len(target._schema.returns)
    return -1


def _sources(nodes: Sequence[fx.Node]) -> str:
    """`modeling_llama.py:63-66`: the lines of one file; of several, the first of each."""
    lines: dict[str, list[int]] = {}
    for node in nodes:
        file, _, line = lowered(node).origin.source.partition(":")
        if file:
            lines.setdefault(file, []).append(int(line) if line.isdigit() else 0)
    spans = {file: sorted(set(numbers) - {0}) for file, numbers in lines.items()}
    return ", ".join(
        file if not found else f"{file}:{found[0]}" + (f"-{found[-1]}" if len(found) > 1 else "")
        for file, found in spans.items()
    )


def sends(node: fx.Node) -> bool:
    """Whether a node is a collective that sends something."""
    collective = collective_of(node)
    return collective is not None and not collective.single.local


def alike(nodes: Iterable[fx.Node], where: Mapping[fx.Node, Spot]) -> int:
    """How many of the nodes, from the first on, are equal views of values in lists, each of another one, or await
    collectives in lists; 0 if too few are."""
    spots: list[Spot] = []
    first: fx.Node | None = None
    for node in nodes:
        first = first or node
        spot = where.get(node.all_input_nodes[0]) if is_view(node) or node.target is wait else None
        if spot is None or spot.at is None or not _equal_views(first, node):
            break
        spots.append(spot)
    short = _in_a_row(spots) or len(", ".join(map(str, spread(spots)))) <= MOST_LISTED
    return len(spots) if len(spots) >= LEAST_ALIKE and short else 0


def _equal_views(one: fx.Node, other: fx.Node) -> bool:
    same = one.target is other.target and list(one.args[1:]) == list(other.args[1:])
    return same and not any(isinstance(arg, fx.Node) for arg in one.args[1:])


def statements(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes that are written as statements: not the results that are unpacked where they are made."""
    here = set(nodes)
    hidden = {piece for node in nodes for piece in unpacked(node, here)}
    return [node for node in nodes if node not in hidden]
