"""The graph after a pass as a picture: boxes for operators, laid out module by module.

    forward            backward
    layers.0.up     | mm          mm_5 mm_6 |     one band a module, in the order of forward
    layers.0.act    | relu        threshold |     forward runs down the left side, backward up the right one
    30 more layers  | x30              x30  |     of layers that are alike, one is drawn

Within a band, an operator stands below those that it reads (forward) or above them (backward).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from shardc.explain.graphs import lines_after
from shardc.ir.facts import FACTS, NOWHERE
from shardc.ir.printing import type_text
from shardc.ir.program import Program, name_of
from shardc.ir.versions import GraphLine
from shardc.planning.compilation import Compilation
from shardc.runtime.collectives.collective import Collective

MOST_BOXES = 1500
"""Boxes of one picture. In a graph of more, each module has one box a phase."""

ACROSS = 3
"""Boxes of one row on either side."""


@dataclass(eq=False)
class _Box:
    """One operator, or what stands for several. `level` is its row within its band, `column` its place there."""

    label: str
    type: str
    module: str
    backward: bool
    kind: str
    reads: list[_Box] = field(default_factory=list["_Box"])
    band: int = 0
    level: int = 0
    column: int = 0
    number: int = -1


def pictures(snapshots: Mapping[str, Compilation]) -> list[dict[str, Any]]:
    """A picture for every pass but the last, which leaves text. Where a pass changes nothing, `same` names the pass
    before it that left the same graph."""
    made: list[dict[str, Any]] = []
    for name, c in snapshots.items():
        if c.has("code"):
            continue
        picture = _picture(c)
        same = made and {**made[-1], "pass": name, "same": ""} == {**picture, "pass": name, "same": ""}
        if same:
            made.append({"pass": name, "same": made[-1].get("same") or made[-1]["pass"]})
        else:
            made.append({"pass": name, **picture})
    return made


def _picture(c: Compilation) -> dict[str, Any]:
    lines, mesh, layouts = lines_after(c)
    folded = _folded([line for line in lines if line.node.op != "output"], lambda line: type_text(line, mesh, layouts))
    names, boxes = _names(c.program), dict[fx.Node, _Box]()
    standing: dict[tuple[str, bool], _Box] = {}
    for line in lines:
        if line.node.op == "output":
            continue
        facts = line.meta.get(FACTS)
        origin = facts.origin if facts is not None else NOWHERE
        module, backward = origin.module, origin.phase == "backward"
        if line.node.op == "placeholder":
            module, backward = names.get(line.node.name, (module, backward))
        more = folded.get(_layer_of(module))
        if more is not None and line.node.op == "placeholder":
            continue
        if more is not None:
            key = (more, backward)
            if key not in standing:
                standing[key] = _Box(more.rpartition(" ")[2] + " more", "", more.rpartition(" ")[0], backward, "layers")
            box = standing[key]
        else:
            box = _Box(_label(line), type_text(line, mesh, layouts), module, backward, _kind(line))
        boxes[line.node] = box
        sources = list[fx.Node]()
        map_arg((line.args, dict(line.kwargs)), sources.append)
        box.reads += [boxes[one] for one in sources if one in boxes and boxes[one] is not box]
    distinct = list({id(box): box for box in boxes.values()}.values())
    return _record(distinct if len(distinct) <= MOST_BOXES else _by_module(distinct))


def _names(program: Program) -> dict[str, tuple[str, bool]]:
    """Module and side of every placeholder, by its name."""
    ports = zip(program.inputs, program.placeholders, strict=True)
    return {
        node.name: (port.name.rpartition(".")[0] if port.role.value in ("parameter", "buffer") else "",
                    port.role.value == "tangent")
        for port, node in ports
    }  # fmt: skip


def _label(line: GraphLine) -> str:
    return line.node.name if line.node.op == "placeholder" else name_of(line.target)


def _kind(line: GraphLine) -> str:
    if line.node.op == "placeholder":
        return "input"
    return "collective" if isinstance(line.target, Collective) else "operator"


def _layer_of(module: str) -> str:
    """The path of the outermost numbered module that a module is or stands in: `model.layers.3`; "" for none."""
    parts = module.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return "" if at is None else ".".join(parts[: at + 1])


def _folded(lines: list[GraphLine], typed: Any) -> dict[str, str]:
    """The layers that are not drawn: for each, which ones stand with it in one box, `model.layers.2–31 30`."""
    shapes: dict[str, list[object]] = defaultdict(list)
    for line in lines:
        facts = line.meta.get(FACTS)
        origin = facts.origin if facts is not None else NOWHERE
        layer = _layer_of(origin.module)
        if layer:
            shapes[layer].append((_label(line), typed(line), origin.module[len(layer) :], origin.phase))
    keys = {layer: (layer.rpartition(".")[0], tuple(shape)) for layer, shape in shapes.items()}
    order = sorted(shapes, key=lambda layer: (layer.rpartition(".")[0], int(layer.rpartition(".")[2])))
    hidden: dict[str, str] = {}
    for _, group in groupby(order, keys.__getitem__):
        _, *others = list(group)
        if len(others) > 1:
            name = f"{others[0]}–{others[-1].rpartition('.')[2]} {len(others)}"
            hidden |= dict.fromkeys(others, name)
    return hidden


def _by_module(boxes: list[_Box]) -> list[_Box]:
    """One box for each module and phase."""
    merged: dict[tuple[str, bool], _Box] = {}
    counts = Counter((box.module, box.backward) for box in boxes)
    for box in boxes:
        key = box.module, box.backward
        if key not in merged:
            merged[key] = _Box(f"{counts[key]} operators", "", box.module, box.backward, "layers")
    for box in boxes:
        one = merged[box.module, box.backward]
        one.reads += [other for read in box.reads if (other := merged[read.module, read.backward]) is not one]
    return list(merged.values())


def _record(boxes: list[_Box]) -> dict[str, Any]:
    bands = _bands(boxes)
    heights = _levels(boxes, len(bands))
    modules = list(dict.fromkeys(bands))
    for number, box in enumerate(boxes):
        box.number = number
    labels, types = (list(dict.fromkeys(texts)) for texts in ([b.label for b in boxes], [b.type for b in boxes]))
    places = ({text: i for i, text in enumerate(labels)}, {text: i for i, text in enumerate(types)})
    kinds = ("operator", "collective", "input", "layers")
    edges = dict.fromkeys((read.number, box.number) for box in boxes for read in box.reads)
    return {
        "labels": labels, "types": types, "modules": modules,
        "bands": [[modules.index(module), height] for module, height in zip(bands, heights, strict=True)],
        "boxes": [[places[0][b.label], places[1][b.type], b.band, int(b.backward), b.level, b.column,
                   kinds.index(b.kind)] for b in boxes],
        "edges": [end for edge in edges for end in edge],
    }  # fmt: skip


def _bands(boxes: list[_Box]) -> list[str]:
    """The modules of bands from top to bottom, and every box gets its band: a new one where forward comes to another
    module. What backward runs for a module is in the last of its bands, then in those before."""
    bands: list[str] = []
    places: dict[str, list[int]] = defaultdict(list)
    for module, group in groupby(
        (box for box in boxes if not box.backward and box.kind != "input"), lambda b: b.module
    ):
        places[module].append(len(bands))
        for box in group:
            box.band = len(bands)
        bands.append(module)
    left = {module: list(reversed(several)) for module, several in places.items()}
    for module, group in groupby((box for box in boxes if box.backward and box.kind != "input"), lambda b: b.module):
        if module not in left:
            left[module] = [len(bands)]
            bands.append(module)
        band = left[module].pop(0) if len(left[module]) > 1 else left[module][0]
        for box in group:
            box.band = band
    for box in reversed(boxes):  # an input stands where it is read first
        for read in box.reads:
            if read.kind == "input" and read.backward == box.backward:
                read.band = box.band
    return bands or [""]


def _levels(boxes: list[_Box], bands: int) -> list[int]:
    """Every box gets its row and column; the heights of the bands in rows."""
    filled: Counter[tuple[int, bool, int]] = Counter()
    heights = [1] * bands
    for box in boxes:
        above = [r.level + 1 for r in box.reads if r.band == box.band and r.backward == box.backward]
        box.level = max(above, default=0)
        while filled[box.band, box.backward, box.level] >= ACROSS:
            box.level += 1
        box.column = filled[box.band, box.backward, box.level]
        filled[box.band, box.backward, box.level] += 1
        heights[box.band] = max(heights[box.band], box.level + 1)
    return heights
