"""A plan as plain records: all that the page shows, and nothing that it has to work out from a program.

    {"mesh": [["dp", 2], ["tp", 2]], "tensors": [...], "modules": {...}, "memory": {...}, "timeline": {...}, ...}

Times are in seconds, sizes in bytes. What occurs often stands once, and others name its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardc.analysis.memory import Memory
from shardc.analysis.recorded_memory import Moment
from shardc.analysis.recorded_step import COMPUTE, RecordedStep, Span
from shardc.explain.plan import Placed, Plan
from shardc.inspect.html.graphs import pictures
from shardc.inspect.html.layouts import Pictures
from shardc.inspect.html.modules import module_tree
from shardc.inspect.html.questions import answers
from shardc.ir.facts import origin_of
from shardc.ir.layout import parse_typed
from shardc.ir.program import name_of
from shardc.planning.compilation import Compilation
from shardc.planning.scheduled import recorded

MOST_MOMENTS = 800
"""Points of the curve of memory; each is the fullest of its stretch of the step."""

TICK = 1e-10
"""The unit of time in a timeline, in seconds."""


@dataclass(frozen=True)
class Asking:
    """How a reader asks what the page does not know. Where `shell`, `command` is that of `shardc explain`, with file,
    mesh and options; else it is the Python that names the plan."""

    command: str
    shell: bool


def plan_records(snapshots: Mapping[str, Compilation], plan: Plan, asking: Asking) -> dict[str, Any]:
    """The records of a plan. `snapshots` has the compilation after every pass, by the pass's name."""
    c = snapshots["overlap"]
    graph, step = c.lowered.read(), recorded(snapshots["schedule"])
    tensors = (*plan.placed, *plan.outputs)
    layouts = Pictures(plan.mesh)
    return {
        "mesh": [list(axis) for axis in plan.mesh.axes],
        "head": list(plan.report().head),
        "notes": list(plan.notes),
        "figures": _figures(plan),
        "tensors": [_tensor(one, plan, layouts) for one in tensors],
        "modules": module_tree(plan, graph, c.pace, tensors, step.peak_by_module, c.call.model),
        "memory": _memory(step, plan.memory),
        "timeline": _timeline(step, plan.mesh.names),
        "graphs": pictures(snapshots),
        "answers": [
            {**one, "picture": layouts.number(parse_typed(one["layout"])[1])}
            for one in answers(plan, tensors, len(graph.nodes))
        ],
        "asking": {"command": asking.command, "shell": asking.shell},
        "layouts": layouts.layouts,
        "dims": layouts.dims,
    }  # fmt: skip


def _figures(plan: Plan) -> dict[str, Any]:
    return {
        "predicted": plan.predicted,
        "objective": plan.cost,
        "bound": plan.lower_bound,
        "compute": plan.compute,
        "conversions": sum(one.seconds for one in plan.conversions),
        "hidden": plan.hidden,
        "peak": plan.memory.peak,
        "budget": plan.memory.budget,
        "sent": plan.bytes_per_axis,
        "hardware": plan.hardware,
        "mode": plan.mode,
    }


def _tensor(one: Placed, plan: Plan, layouts: Pictures) -> list[Any]:
    """Role, name, type, layout, and bytes: of the whole, and of what a rank holds."""
    dtype, layout = parse_typed(f"{one.dtype}{one.layout}")
    whole, local = math.prod(layout.shape), math.prod(layout.local_shape(plan.mesh))
    number = layouts.number(one.layout)
    return [one.role, one.name, one.dtype, number, whole * dtype.itemsize, local * dtype.itemsize]


def _memory(step: RecordedStep, peak: Memory) -> dict[str, Any]:
    labels = list(dict.fromkeys(label for moment in step.moments for label in moment.held))
    shown = fullest(list(zip(step.starts, step.moments, strict=True)))
    return {
        "labels": labels,
        "at": [at for at, _ in shown],
        "held": [[round(moment.held.get(label, 0)) for _, moment in shown] for label in labels],
        "calls": [_called(moment) for _, moment in shown],
        "peak": {"bytes": peak.peak, "phase": peak.phase, "place": peak.place, "parts": peak.largest},
        "budget": peak.budget,
    }


def _called(moment: Moment) -> str:
    return f"{name_of(moment.node.target)} in {origin_of(moment.node).module or 'the model'}, {moment.phase}"


def fullest(moments: Sequence[tuple[float, Moment]]) -> list[tuple[float, Moment]]:
    """At most `MOST_MOMENTS` of the moments, each with its second: the fullest of each stretch."""
    stretch = math.ceil(len(moments) / MOST_MOMENTS) or 1
    pieces = [moments[start : start + stretch] for start in range(0, len(moments), stretch)]
    return [max(piece, key=lambda one: one[1].total) for piece in pieces]


def _timeline(step: RecordedStep, axes: Sequence[str]) -> dict[str, Any]:
    """Spans as columns of numbers: what runs, in which module and phase, on which lane, from when on, how long."""
    lanes = [COMPUTE, *axes]
    spans = [span for span in step.spans if not span.waits]
    numbers: dict[tuple[str, str, str], int] = {}

    def row(span: Span) -> tuple[int, int, int, int]:
        origin = origin_of(span.node)
        what = numbers.setdefault((span.name, origin.module, origin.phase), len(numbers))
        return what, lanes.index(span.track), round(span.start / TICK), round((span.end - span.start) / TICK)

    columns = zip(*map(row, spans), strict=True) if spans else ([], [], [], [])
    what, lane, start, length = (list(column) for column in columns)
    modules = list(dict.fromkeys(module for _, module, _ in numbers))
    places = {module: place for place, module in enumerate(modules)}
    return {
        "seconds": step.seconds, "tick": TICK, "lanes": lanes, "modules": modules,
        "whats": [[name, places[module], phase] for name, module, phase in numbers],
        "what": what, "lane": lane, "start": start, "length": length,
    }  # fmt: skip
