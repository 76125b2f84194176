"""A generated module: its docstring, imports, slots, the functions of repeated layers, forward and backward."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from shardc.ir.facts import laid, lowered
from shardc.ir.mesh import Mesh
from shardc.ir.partition import Partition, partition
from shardc.ir.program import Port, Program, Role
from shardc.runtime.kernels.random import DRAWS, INDEPENDENT, fresh_seed
from shardc.source.body import NoPlace, Shared
from shardc.source.calls import CallTexts, imported, shown
from shardc.source.frees import Holding
from shardc.source.halves import LEAST_GIVEN, Half, Refused
from shardc.source.layers import LIVING
from shardc.source.naming import Naming
from shardc.source.places import Spot
from shardc.source.repetition import LoopPlace
from shardc.source.slots import Row, gradients, rows, table
from shardc.source.taken import Taken
from shardc.source.text import WIDTH, Item, arguments, tuple_of, values, written

MOST_BEFORE_STAR = 255
"""Names that Python takes before a starred one, in an assignment."""


Slots = list[tuple[fx.Node, Port]]
"""Values with their ports."""


@dataclass(frozen=True)
class Once:
    """What runs once, before or behind what runs several times: its graph, the program of which that is the graph, and
    what is told beside a collective. A prologue computes what all micro-batches read. An epilogue reduces the gradients
    that backward leaves as addends, from their sums."""

    graph: fx.Graph
    program: Program
    told: Callable[[fx.Node], str]


@dataclass(frozen=True)
class Predicted:
    """What the plan says of a program: the lines of the docstring, what is told beside a collective, and what is held,
    without which every value is deleted behind its last reader."""

    lines: Sequence[str] = ()
    told: Callable[[fx.Node], str] = lambda _: ""
    held: Holding | None = None
    prologue: Once | None = None
    epilogue: Once | None = None


def source_of(
    graph: fx.Graph, program: Program, mesh: Mesh, predicted: Predicted | None = None, *, loops: bool = True
) -> str:
    """The source of the module for a localized graph whose placeholders and outputs are those of `program`. With
    `loops`, repeated layers become functions, but for those whose lists would hold more than the plan says."""
    refused, apart = set[LoopPlace](), set[LoopPlace]()
    while loops:
        try:
            return _Module(graph, program, mesh, predicted or Predicted(), refused, apart).text(loops)
        except Refused as error:
            (apart if error.apart else refused).add(error.loop)
        except NoPlace:
            break
    return _Module(graph, program, mesh, predicted or Predicted()).text(loops=False)


_NAMES = (
    "torch", "Tensor", "Sequence", "Slot", "Started", "take", "aten", "MESH", "RANDOM", "SIZES", "INPUTS", "OUTPUTS",
    "TANGENTS", "GRADIENTS", "DEFERRED", "MICROBATCHES", "AT_ONCE", "PROLOGUE", "forward", "backward", "prologue",
    "epilogue", "main", "i", "slot", "shardc",
)  # fmt: skip
"""Names that mean something in every module."""


class _Module:
    def __init__(
        self,
        graph: fx.Graph,
        program: Program,
        mesh: Mesh,
        predicted: Predicted,
        refused: Collection[LoopPlace] = (),
        apart: Collection[LoopPlace] = (),
    ) -> None:
        self.graph, self.program, self.mesh, self.predicted = graph, program, mesh, predicted
        self.refused, self.apart = refused, apart
        self.run: Partition = partition(graph, program)
        self.taken: set[str] = {*_NAMES}
        self.imports: set[str] = set()
        """What the epilogue needs of the runtime."""
        self.calls = CallTexts(graph, self.taken)
        self.shared = Shared(self.calls, Naming(graph, program), mesh, self.taken, predicted.told, predicted.held)

    def text(self, loops: bool) -> str:
        forward = self._half("forward", self.run.forward, [*self.run.outputs, *self.run.saved], loops)
        head = self._given(forward)
        forward.write([])
        saved, takes, backward = list(self.run.saved), list[Taken](), None
        if self.run.gradients:
            backward = self._half("backward", self.run.backward, self.run.gradients, loops)
            takes = backward.taken(forward, saved)
            inside = {node for one in takes for node in one.nodes}
            saved = [*(node for node in saved if node not in inside), *(n for one in takes for n in one.nodes)]
        returned = self._returned(forward, saved)  # asked first: a list is not deleted of which a place is returned
        parts = [*head, *forward.body(), *returned]
        functions = list(forward.functions)
        if backward is not None:
            start = self._start(backward, saved, takes)
            backward.write(takes)
            functions += backward.functions
            returned = written(["return ", backward.returned(self.run.gradients)], 1)
            parts += ["", "", *start, *backward.body(), *returned]
        if self.predicted.prologue is not None:
            parts = [*self._prologue(self.predicted.prologue), "", "", *parts]
        if self.predicted.epilogue is not None:
            more, lines = self._epilogue(self.predicted.epilogue, loops)
            functions += more
            parts += ["", "", *lines]
        return "\n".join([*self._top(functions), *self._slots(), *functions, "", "", *parts, ""])

    def _prologue(self, prologue: Once) -> list[str]:
        other = _Module(prologue.graph, prologue.program, self.mesh, Predicted(told=prologue.told))
        other.shared.taken = self.taken
        half = other._half("prologue", other.run.forward, other.run.outputs, loops=False)
        head = other._given(half)
        half.write([])
        returned = other._returned(half, [])
        self.imports |= {*other.calls.imports, *other.shared.used}
        return [*head, *half.body(), *returned]

    def _epilogue(self, epilogue: Once, loops: bool) -> tuple[list[str], list[str]]:
        """The functions of repeated layers of the epilogue, and the epilogue itself."""
        other = _Module(
            epilogue.graph, epilogue.program, self.mesh, Predicted(told=epilogue.told), self.refused, self.apart
        )
        other.shared.taken = self.taken
        half = other._half("epilogue", other.run.backward, other.run.gradients, loops)
        start = other._start(half, [], [])
        half.write([])
        returned = written(["return ", half.returned(other.run.gradients)], 1)
        self.imports |= {*other.calls.imports, *other.shared.used}
        return half.functions, [*start, *half.body(), *returned]

    def _half(self, name: str, nodes: Sequence[fx.Node], results: Sequence[fx.Node | None], loops: bool) -> Half:
        placeholders = {*self.run.given, *(node for node in self.run.outputs if node is not None)}
        given = set(self.run.given) if name == "forward" else placeholders
        return Half(
            name,
            nodes,
            results,
            self.run.saved,
            self.shared,
            self.predicted.held,
            given,
            loops,
            self.refused,
            self.apart,
        )

    # the beginning and the end of forward

    def _given(self, forward: Half) -> list[str]:
        """The head of forward: its arguments by name, or one list with those that loops read run by run."""
        read = {v for loop in forward.loops for c in loop.columns if not c.same and c.carried is None for v in c.values}
        given, writer = self.run.given, forward.writer
        stretches: list[tuple[int, int]] = []
        at = 0
        while at < len(given):
            stop = at
            while stop < len(given) and given[stop] in read:
                stop += 1
            if stop - at >= LEAST_GIVEN:
                stretches.append((at, stop))
            at = max(stop, at + 1)
        returns = ") -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:"
        inside = {place for start, stop in stretches for place in range(start, stop)}
        for place, node in enumerate(given):
            if place not in inside:
                unread = "" if forward.lives.read(node) or not stretches else "_"
                writer.where[node] = Spot(writer.scope.name(unread + self.shared.naming.of(node, layer=False)))
        if not stretches:
            named = [f"{writer.where[node]}: Tensor" for node in given]
            return written([f"def {forward.name}", arguments(named), returns[1:]], 0)
        names = [writer.scope.name("layers") for _ in stretches]
        for name, (start, stop) in zip(names, stretches, strict=True):
            for place in range(start, stop):
                writer.where[given[place]] = Spot(name, place - start, stop - start)
        whole = writer.scope.name("given")
        lines = [f"def {forward.name}(*{whole}: Tensor{returns}"]
        if len(stretches) == 1 and stretches[0][0] <= MOST_BEFORE_STAR:
            start, stop = stretches[0]
            items = [str(writer.where[n]) for n in given[:start]] + [f"*{names[0]}"]
            items += [str(writer.where[n]) for n in given[stop:]]
            return [*lines, *written([tuple_of(items) if len(items) > 1 else values(items), f" = {whole}"], 1)]
        for name, (start, stop) in zip(names, stretches, strict=True):
            lines += written([f"{name} = {whole}[{start}:{stop}]"], 1)
        edges = [0, *(edge for stretch in stretches for edge in stretch), len(given)]
        between = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
        for start, stop in between:
            items = [str(writer.where[node]) for node in given[start:stop]]
            lines += written([tuple_of(items) if len(items) > 1 else values(items), f" = {whole}[{start}:{stop}]"], 1)
        return lines

    def _returned(self, forward: Half, saved: Sequence[fx.Node]) -> list[str]:
        outputs = forward.returned(self.run.outputs)
        kept = forward.returned(saved if self.run.gradients else [])
        return written(["return ", values([outputs, kept], bare=True)], 1)

    def _start(self, backward: Half, saved: Sequence[fx.Node], takes: Sequence[Taken]) -> list[str]:
        """The head of backward: what forward saved and the tangents, by name and in lists."""
        writer = backward.writer
        given = writer.scope.name("given")
        inside = {node for one in takes for node in one.nodes}
        named = [node for node in saved if node not in inside]
        before = [str(writer.name(node)) for node in named]
        for one in takes:
            one.name = writer.scope.name(one.wanted)
        after = [str(writer.name(node)) for node in self.run.tangents]
        first = [f"*{takes[0].name}"] if takes else []
        lines = [f"def {backward.name}({given}: list[Tensor]) -> tuple[Tensor | None, ...]:"]
        while first and len(before) > MOST_BEFORE_STAR:
            more, front = writer.scope.name("given"), before[:MOST_BEFORE_STAR]
            lines += written([values([*front, f"*{more}"]), f" = {given}"], 1)
            lines += written([f"{given}.clear()"], 1, LIVING)
            given, before = more, before[MOST_BEFORE_STAR:]
        items: list[Item] = [*before, *first, *after]
        lines += written([values(items), f" = {given}"], 1)
        lines += written([f"{given}.clear()"], 1, LIVING)
        for one in reversed(takes[1:]):
            self.shared.used.add("take")
            lines += written([f"{one.name} = take({takes[0].name}, {len(one.nodes)})"], 1)
        return lines

    # the top of the module

    def _top(self, functions: Sequence[str]) -> list[str]:
        abstract = (
            ["from collections.abc import Sequence", ""] if any("Sequence[" in line for line in functions) else []
        )
        names = sorted({"Slot", *self.imports, *self.calls.imports, *self.shared.used}, key=_order)
        line = written(["from shardc.runtime import ", tuple_of(names)], 0)
        body = self.predicted.lines or ("Runs with torch and shardc.runtime alone.",)
        doc = [f'"""Generated by shardc for mesh {self.mesh}.', ""]
        for told in body:
            doc += textwrap.wrap(told, WIDTH, subsequent_indent="    ", break_on_hyphens=False) or [""]
        doc.append('"""')
        targets = {node.target for node in self.calls.nodes}
        random = INDEPENDENT if fresh_seed in targets else not targets.isdisjoint(DRAWS)
        constants = [f"MESH = {shown(dict(self.mesh.sizes))}", f"RANDOM = {shown(random)}"]
        if self.program.microbatches is not None:
            constants += [f"MICROBATCHES = {self.program.microbatches.count}", f"AT_ONCE = {self._at_once()}"]
        return [
            *doc, "", *abstract, "import torch", "from torch import Tensor", "",
            *line, *imported(self.calls.bodies), "",
            "aten = torch.ops.aten", *constants, "",
        ]  # fmt: skip

    def _at_once(self) -> bool:
        """Whether each micro-batch runs backward right behind forward: where all gradients are those of one number, a
        loss, whose own gradient only scales them. It does not scale them in float16 too late, where they may have been
        too small."""
        (*tangents,) = self.run.tangents
        kinds = {lowered(node).dtype for node in self.graph.nodes if node.op != "output"}
        return len(tangents) == 1 and not laid(tangents[0]).shape and torch.float16 not in kinds

    def _slots(self) -> list[str]:
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        results: Sequence[fx.Node | None] = self.graph.output_node().args[0]  # type: ignore[assignment]
        ins = list(zip(placeholders, self.program.inputs, strict=True))
        outs = [(n, p) for n, p in zip(results, self.program.outputs, strict=True) if n is not None]

        def of(slots: Slots) -> list[Row]:
            return rows(slots, self.program, self.mesh)

        inputs = of([(n, p) for n, p in ins if p.role is not Role.TANGENT])
        made = [(n, p) for n, p in outs if p.role is Role.GRADIENT]
        if self.predicted.epilogue is not None:
            made = self._finished(made, self.predicted.epilogue)
        return [
            *self._before(),
            *table("INPUTS", inputs),
            *table("OUTPUTS", of([(n, p) for n, p in outs if p.role is not Role.GRADIENT])),
            *table("TANGENTS", of([(n, p) for n, p in ins if p.role is Role.TANGENT])),
            *gradients(inputs, of(made)),
            *self._deferred([port for _, port in made]),
        ]

    def _before(self) -> list[str]:
        """What the prologue is given."""
        if self.predicted.prologue is None:
            return []
        graph, program = self.predicted.prologue.graph, self.predicted.prologue.program
        given = list(zip(graph.find_nodes(op="placeholder"), program.inputs, strict=True))
        return table("PROLOGUE", rows(given, program, self.mesh))

    def _finished(self, made: Slots, epilogue: Once) -> Slots:
        """The gradients as the epilogue leaves them."""
        results: list[fx.Node] = list(epilogue.graph.output_node().args[0])  # type: ignore[arg-type]
        ends = dict(zip(epilogue.program.outputs, results, strict=True))
        return [(ends.get(port, node), port) for node, port in made]

    def _deferred(self, made: Sequence[Port]) -> list[str]:
        """Which gradients the epilogue makes of what backward leaves."""
        if self.predicted.epilogue is None:
            return []
        return [f"DEFERRED = {shown(tuple(made.index(port) for port in self.predicted.epilogue.program.outputs))}"]


def _order(name: str) -> tuple[int, str]:
    """As `ruff` sorts imported names: constants, then classes, then functions."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name
