"""Traces: what a plan predicts, and what a run took, as tracks that Perfetto and chrome://tracing show.

    {"ph": "X", "pid": 1, "tid": 1, "name": "layers.0.mlp: mm", "ts": 12.5, "dur": 80.0, "args": {"bytes": 4096, ...}}

Each process of a trace is one rank: the predicted one first, then those that were measured. Its tracks are `compute`,
what the rank itself does, waiting included, and one for the collectives of each mesh axis; what it holds is a counter.
The format is Google's Trace Event Format; times are in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx

from shardc.analysis.operands import collective_of, operand_bytes
from shardc.analysis.recorded_step import COMPUTE, Span
from shardc.errors import ShardcError
from shardc.ir.facts import dtype_of, lowered, origin_of
from shardc.ir.layout import SHORT_DTYPES
from shardc.ir.mesh import Mesh
from shardc.ir.program import where
from shardc.planning.compilation import Compilation
from shardc.planning.scheduled import recorded

MICROSECONDS = 1e6


@dataclass(frozen=True)
class Slice:
    """One thing on a track, in seconds. `module` is the path of the user's module, `""` for the root; `kind` the
    operator or collective."""

    track: str
    module: str
    kind: str
    start: float
    end: float
    told: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Process:
    """The tracks of one rank, and the bytes that it holds, by second."""

    name: str
    slices: tuple[Slice, ...]
    held: tuple[tuple[float, float], ...] = ()


def predicted(c: Compilation) -> Process:
    """The timeline of a compilation that `overlap` has left: the rank's slices follow each other without a gap, and end
    at `plan.predicted`."""
    step = recorded(c)
    held = zip(step.starts, (moment.total for moment in step.moments), strict=True)
    return Process("predicted", tuple(_slice(span, c.mesh) for span in step.spans), tuple(held))


def _slice(span: Span, mesh: Mesh) -> Slice:
    module = origin_of(span.node).module
    return Slice(span.track, module, span.name, span.start, span.end, told_of(span.node, mesh))


def told_of(node: fx.Node, mesh: Mesh) -> dict[str, Any]:
    """What a trace tells of a call besides its module: value, line, phase, layout, and the bytes of a collective."""
    told: dict[str, Any] = {"value": f"%{node.name}", "place": where(node), "phase": origin_of(node).phase}
    layout = lowered(node).layout
    if layout is not None:
        told["layout"] = f"{SHORT_DTYPES[dtype_of(node)]}{layout.simplify(mesh)}"
    if collective_of(node) is not None:
        told["bytes"] = sum(operand_bytes(node, mesh))
    return told


def write(path: Path, processes: Sequence[Process]) -> None:
    """Write a trace. Raises ShardcError where the file cannot be written."""
    events = [event for number, one in enumerate(processes, 1) for event in _events(number, one)]
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise ShardcError(f"{path} cannot be written: {error.strerror}; name another file") from error


def _events(pid: int, process: Process) -> Iterator[dict[str, Any]]:
    tracks = dict.fromkeys([COMPUTE, *(one.track for one in process.slices)])
    numbers = {track: tid for tid, track in enumerate(tracks, 1)}
    yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process.name}}
    yield {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}
    titles = {track: "compute" if track == COMPUTE else f"axis {track}" for track in numbers}
    for track, tid in numbers.items():
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": titles[track]}}
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}
    for one in process.slices:
        yield {
            "ph": "X", "pid": pid, "tid": numbers[one.track], "cat": titles[one.track],
            "name": f"{one.module}: {one.kind}" if one.module else one.kind,
            "ts": one.start * MICROSECONDS, "dur": (one.end - one.start) * MICROSECONDS, "args": one.told,
        }  # fmt: skip
    for second, size in process.held:
        yield {"ph": "C", "pid": pid, "name": "memory", "ts": second * MICROSECONDS, "args": {"bytes": size}}
