"""The roles of axes, read off the layouts and strategies of a resharded program.

    mm [batch@dp seq, k] x [k, n@tp]       dp is data parallel, tp splits columns of a weight
    attention [batch@dp, heads@tp, seq]    tp splits heads
    all_gather(%weight, axis=dp)           dp stores the weight split

A dim is known by its piece (`shardc/rules/factors/atoms.py`), which all dims have that operators tie together. The
batch is dim 0 of the inputs. What else counts rows in a product with a weight is a position of a sequence. Paths of
modules tell which layers repeat, and nothing else.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from torch import fx

from shardc.analysis.operands import collective_of
from shardc.analysis.parallelism import COLUMNS, ROWS, AxisRole, AxisUse, Block, Parallelism, Use
from shardc.ir.facts import Key, lowered, origin_of
from shardc.ir.mesh import Mesh
from shardc.ir.program import Role, tensor_of
from shardc.rules.factors.chosen import Chosen, chosen_of
from shardc.rules.factors.factored import Factored, Value
from shardc.rules.factors.rings import circle_of
from shardc.rules.notation import Band
from shardc.runtime.collectives.all_gather import all_gather
from shardc.runtime.mesh.orders import axis_of

HEADS = "heads of attention"
LITTLE = 0.05
"""What an axis does in less than this part of the work is told of single blocks, not of the axis."""

Doing = tuple[str, AxisRole, str]
"""An axis, its role, and how."""


@dataclass
class _Place:
    """What was read in one block: the work (flops) of everything that an axis does, to which weights it does that; and
    the bytes of results beside the products, by axis and by what it splits of them."""

    work: dict[Doing, float] = field(default_factory=lambda: defaultdict[Doing, float](float))
    weights: dict[Doing, dict[str, None]] = field(default_factory=lambda: defaultdict[Doing, dict[str, None]](dict))
    beside: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    total: float = 0.0

    def note(self, doing: Doing, work: float, weight: str = "") -> None:
        self.work[doing] += work
        if weight:
            self.weights[doing][weight] = None


def parallelism_of(graph: fx.Graph, factored: Factored, mesh: Mesh) -> Parallelism:
    """What the axes of `mesh` do in a program that was resharded to `graph`, of which `factored` has the atoms."""
    return _Reading(graph, factored, mesh).result()


class _Reading:
    def __init__(self, graph: fx.Graph, factored: Factored, mesh: Mesh) -> None:
        self.factored, self.program = factored, factored.program
        self.axes = [axis for axis, ways in mesh.axes if ways > 1]
        self.ways = mesh.sizes
        self.chosen = list(_forward(graph))
        self.stored = self._stored()
        self.batch = self._batch()
        self.weighed = self._weighed()
        self.gathers = self._gathers(graph)
        self.places: dict[str, _Place] = {}
        for chosen in self.chosen:
            if chosen.op.node.op != "placeholder":
                place = self.places.setdefault(_block(origin_of(chosen.op.node).module), _Place())
                self._read(chosen, place)

    def result(self) -> Parallelism:
        everywhere = Counter[tuple[str, str]]()
        for place in self.places.values():
            everywhere.update(place.beside)
        for place in self.places.values():
            for axis in self.axes:
                _as_context(place, axis)
                # what is between the layers may stand in the code of none
                alone = any(a == axis for a, _ in place.beside)
                _note_between(place, axis, place.beside if alone else everywhere)
        return Parallelism(tuple(map(self._axis, self.axes)), tuple(self._blocks()))

    # pieces

    def _pieces(self, value: Value) -> list[int]:
        return [self.factored.atoms.piece(ref) for ref in self.factored.leaves(value)]

    def _stored(self) -> dict[Key, str]:
        """The values made of parameters, buffers and constants alone, with the name of the first."""
        kinds = (Role.PARAMETER, Role.BUFFER, Role.CONSTANT)
        ports = zip(self.program.inputs, self.program.placeholders, strict=True)
        stored = {(node, 0): port.name for port, node in ports if port.role in kinds}
        for op in (chosen.op for chosen in self.chosen):
            sources = [operand.value.key for operand in op.operands]
            if sources and all(key in stored for key in sources):
                stored |= {result.key: stored[sources[0]] for result in op.results}
        return stored

    def _batch(self) -> set[int]:
        """The pieces of dim 0 of the inputs that have as many rows as the first."""
        ports = zip(self.program.inputs, self.program.placeholders, strict=True)
        nodes = [node for port, node in ports if port.role is Role.INPUT and tensor_of((node, 0)).dim()]
        rows = [int(tensor_of((node, 0)).shape[0]) for node in nodes]
        atoms, values = self.factored.atoms, self.factored.values
        dims = [values[node].dims[0] for node, count in zip(nodes, rows, strict=True) if count == rows[0]]
        return {atoms.piece(ref) for dim in dims for ref in atoms.leaves(dim)}

    def _weighed(self) -> set[int]:
        """The pieces of dims of parameters."""
        ports = zip(self.program.inputs, self.program.placeholders, strict=True)
        nodes = [node for port, node in ports if port.role is Role.PARAMETER]
        return {piece for node in nodes for piece in self._pieces(self.factored.values[node])} - self.batch

    # operators

    def _read(self, chosen: Chosen, place: _Place) -> None:
        flops = _flops(chosen)
        if not flops:
            self._read_beside(chosen, place)
            return
        place.total += flops
        weight = next((self.stored[o.value.key] for o in chosen.op.operands if o.value.key in self.stored), "")
        for doing in self._doings(chosen, bool(weight)):
            place.note(doing, flops, weight)

    def _doings(self, chosen: Chosen, weighs: bool) -> Iterator[Doing]:
        """What axes do in an operator with matrix products, one of whose operands is made of weights or none."""
        roles, circle = self._factors(chosen, weighs), circle_of(chosen.shape, chosen.strategy)
        for position, axes in enumerate(chosen.strategy.split):
            for axis in map(axis_of, axes):
                # of what goes round a ring, every rank sees all: that is how it lies between products
                goes_round = circle is not None and (circle.axis, circle.around) == (axis, position)
                if axis in self.axes and position in roles and not goes_round:
                    yield axis, *roles[position]

    def _factors(self, chosen: Chosen, weighs: bool) -> dict[int, tuple[AxisRole, str]]:
        """What splitting a factor is, by the factor's position."""
        op, band = chosen.op, chosen.op.rule.band
        carried = [
            {f: piece for f, piece in zip(factors, self._pieces(item.value), strict=True) if f is not None}
            for item, factors in zip(op.items, op.kind.carried, strict=True)
        ]
        operands, result = carried[: len(op.operands)], carried[len(op.operands)]
        of_weights = [pieces for o, pieces in zip(op.operands, operands, strict=True) if o.value.key in self.stored]
        exchange = next((v.exchange for v in op.rule.variants if v.exchange), None)
        roles: dict[int, tuple[AxisRole, str]] = {}
        for position, factor in enumerate(op.factors):
            pieces = {one[position] for one in carried if position in one}
            in_weights = any(position in one for one in of_weights)
            in_others = any(position in one for one in operands if one not in of_weights)
            if exchange is not None and factor.name == exchange[0]:
                how = "tokens go to their experts" if chosen.strategy.variant and _exchanged(chosen) else "experts"
                roles[position] = AxisRole.EXPERT, how
            elif pieces & self.batch:
                roles[position] = AxisRole.DATA, "batch"
            elif weighs and in_weights:
                both = in_others and position in result
                roles[position] = _of_weights(both, position in result)
            elif weighs or (band is not None and factor.name in (band.rows, band.columns)):
                roles[position] = AxisRole.CONTEXT, _positions(chosen, band, factor.name) if band else "sequence"
            elif pieces & self.weighed:
                roles[position] = AxisRole.TENSOR, HEADS if position in result else ROWS
            else:
                roles[position] = AxisRole.CONTEXT, "sequence"
        return roles

    def _read_beside(self, chosen: Chosen, place: _Place) -> None:
        """Note what axes split of the results of an operator without products, if these have rows of a batch."""
        for result in chosen.op.results:
            pieces = self._pieces(result.value)
            if result.key in self.stored or not self.batch.intersection(pieces):
                continue
            size = tensor_of(result.key).nbytes
            carried = chosen.op.kind.carried[len(chosen.op.operands) + chosen.op.results.index(result)]
            split = {
                axis_of(axis): piece
                for factor, piece in zip(carried, pieces, strict=True) if factor is not None
                for axis in chosen.strategy.split[factor]
            }  # fmt: skip
            for axis in self.axes:
                piece = split.get(axis)
                what = "batch" if piece in self.batch else "" if piece is None or piece in self.weighed else "sequence"
                if what or piece is None:
                    place.beside[axis, what] += size

    # weights

    def _gathers(self, graph: fx.Graph) -> dict[str, set[str]]:
        """By axis the weights that are gathered over it."""
        gathers: dict[str, set[str]] = {axis: set() for axis in self.axes}
        for node in graph.nodes:
            if collective_of(node) is all_gather:
                name, axis = self.stored.get(lowered(node).base or (node, 0)), str(node.kwargs["axis"])
                if name is not None and axis in gathers:
                    gathers[axis].add(name)
        return gathers

    # what is told

    def _axis(self, axis: str) -> AxisUse:
        total = sum(place.total for place in self.places.values())
        work: dict[Doing, float] = defaultdict(float)
        for place in self.places.values():
            for doing, amount in place.work.items():
                if doing[0] == axis:
                    work[doing] += amount
        most = sorted(
            (doing for doing, amount in work.items() if amount >= LITTLE * total),
            key=lambda d: (d[1] is AxisRole.SEQUENCE, -work[d], d[2]),
        )
        if (axis, AxisRole.DATA, "batch") in most:
            most = [doing for doing in most if doing[1] is not AxisRole.DATA or doing[2] == "batch"]
        weights = [port.name for port in self.program.inputs if port.role is Role.PARAMETER]
        gathered = len(self.gathers[axis].intersection(weights))
        uses = [Use(role, how) for _, role, how in most]
        if gathered:
            uses.append(Use(AxisRole.STORAGE, "weights gathered before use"))
        return AxisUse(axis, self.ways[axis], tuple(uses), gathered, len(weights))

    def _blocks(self) -> Iterator[Block]:
        """Equal layers that follow one another are one block."""
        told = [(name, self._uses(name, place)) for name, place in self.places.items() if place.total]
        groups: dict[str, list[tuple[int, Mapping[str, tuple[Use, ...]]]]] = {}
        for name, uses in told:
            pattern = re.sub(r"(^|\.)\d+$", r"\1*", name)
            number = int(name.rpartition(".")[2]) if pattern != name else 0
            groups.setdefault(pattern, []).append((number, uses))
        for pattern, layers in groups.items():
            yield from _runs(pattern, layers)

    def _uses(self, name: str, place: _Place) -> Mapping[str, tuple[Use, ...]]:
        uses: dict[str, list[Use]] = {axis: [] for axis in self.axes}
        for doing in place.work:
            axis, role, how = doing
            weights = tuple(_within(weight, name) for weight in place.weights[doing])
            uses[axis].append(Use(role, how, weights))
        for axis, names in self.gathers.items():
            own = tuple(_within(weight, name) for weight in sorted(names) if _block(weight) == name)
            if own:
                uses[axis].append(Use(AxisRole.STORAGE, "weights gathered before use", own))
        return {axis: tuple(several) for axis, several in uses.items()}


def _forward(graph: fx.Graph) -> Iterator[Chosen]:
    """The placeholders and the operators of forward, each once, with their strategies."""
    seen = set[fx.Node]()
    for node in graph.nodes:
        chosen = chosen_of(node) if node.op != "output" else None
        if chosen is not None and chosen.op.node not in seen and origin_of(chosen.op.node).phase != "backward":
            seen.add(chosen.op.node)
            yield chosen


def _flops(chosen: Chosen) -> float:
    """The flops of an operator on one device."""
    factors = chosen.shape.factors
    return sum(2 * part * math.prod(factors[i].size for i in product) for part, product in chosen.shape.products)


def _exchanged(chosen: Chosen) -> bool:
    return chosen.op.rule.variant(chosen.strategy.variant).exchange is not None


def _of_weights(both: bool, in_result: bool) -> tuple[AxisRole, str]:
    """What splitting a dim of a weight is: `both` operands of a product and its result have it, or the result."""
    if both:
        return AxisRole.EXPERT, "products with weights of their own"
    return AxisRole.TENSOR, COLUMNS if in_result else ROWS


def _positions(chosen: Chosen, band: Band, name: str) -> str:
    """Which way attention is run whose queries or keys are split."""
    split = {f.name for f, axes in zip(chosen.op.factors, chosen.strategy.split, strict=True) if axes}
    if {band.rows, band.columns} <= split:
        return "queries and keys, in a ring"
    return "keys, combined by log-sum-exp" if name == band.columns else "queries, with all keys gathered"


def _as_context(place: _Place, axis: str) -> None:
    """An axis that splits heads in attention, and the sequence in the products with weights around it, is none that
    splits weights."""
    hows = {how for a, _, how in place.work if a == axis}
    heads = axis, AxisRole.TENSOR, HEADS
    if heads in place.work and not hows & {COLUMNS, ROWS} and "sequence" in hows:
        place.note((axis, AxisRole.CONTEXT, HEADS), place.work.pop(heads))


def _note_between(place: _Place, axis: str, beside: Mapping[tuple[str, str], float]) -> None:
    """What an axis that splits weights splits beside the products, if that is rows more often than nothing. `beside`
    are the bytes of results there, by axis and what it splits of them. Of an axis that also splits the batch of some
    products, that says nothing new."""
    work = sum(amount for (a, role, _), amount in place.work.items() if a == axis and role is AxisRole.TENSOR)
    rows = {what: beside.get((axis, what), 0.0) for what in ("sequence", "batch")}
    what = max(rows, key=lambda one: rows[one])
    if work and rows[what] > beside.get((axis, ""), 0.0):
        if what == "sequence":
            place.note((axis, AxisRole.SEQUENCE, "sequence between them"), work)
        elif (axis, AxisRole.DATA, "batch") not in place.work:
            place.note((axis, AxisRole.DATA, "batch between them"), work)


@cache
def _block(path: str) -> str:
    """The repeated layer that a module or weight belongs to (`model.layers.3`); "" for what is in none."""
    layer = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", path)
    return layer[0] if layer else ""


def _within(weight: str, block: str) -> str:
    """The path of a weight inside its block."""
    return weight.removeprefix(f"{block}." if block else "").removesuffix(".weight")


def _runs(pattern: str, layers: list[tuple[int, Mapping[str, tuple[Use, ...]]]]) -> Iterator[Block]:
    runs: list[tuple[int, int, Mapping[str, tuple[Use, ...]]]] = []
    for number, uses in layers:
        if runs and runs[-1][2] == uses:
            runs[-1] = runs[-1][0], number, uses
        else:
            runs.append((number, number, uses))
    for first, last, uses in runs:
        name = pattern if len(runs) == 1 else pattern.replace("*", str(first) if first == last else f"{first}-{last}")
        yield Block(name, last - first + 1, uses)
