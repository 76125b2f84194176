"""Traces: what a plan predicts, and what a run took, as tracks that Perfetto and chrome://tracing show.

    {"ph": "X", "pid": 1, "tid": 1, "name": "layers.0.mlp: mm", "ts": 12.5, "dur": 80.0, "args": {"bytes": 4096, ...}}

Each process of a trace is one rank: the predicted one first, then those that were measured. Its tracks are `compute`,
what the rank itself does, waiting included, and one for the collectives of each mesh axis; what it holds is a counter.
The format is Google's Trace Event Format; times are in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx

from shardc.analysis.memory import MemoryAnalysis
from shardc.analysis.operands import collective_of, operand_bytes
from shardc.analysis.spans import COMPUTE, Span, spans
from shardc.analysis.timeline import Times
from shardc.errors import ShardcError
from shardc.ir.facts import dtype_of, lowered, origin_of
from shardc.ir.layout import SHORT_DTYPES
from shardc.ir.partition import partition
from shardc.ir.program import name_of, where
from shardc.planning.compilation import Compilation

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
    graph = c.schedule.bucketed.read()
    run, nodes = partition(graph, c.program), {node.name: node for node in graph.nodes}
    order = [(nodes[name], awaited) for name, awaited in c.schedule.order]
    found = spans(order, Times(run, c.pace))
    slices = tuple(_slice(span, c) for span in found)
    border, forward = 0, set(run.forward)
    while border < len(order) and order[border][0] in forward:
        border += 1
    halves = order[:border], order[border:]
    held = MemoryAnalysis(graph, run, c.program, c.mesh, c.states).line_by_line(*halves).held
    bytes_held = [*held.get("forward", ()), *held.get("backward", ())]
    ends = _ends([span for span in found if span.track == COMPUTE], [node for node, _ in order])
    return Process("predicted", slices, tuple(zip(ends, bytes_held, strict=True)))


def _ends(spans: Iterable[Span], nodes: Sequence[fx.Node]) -> list[float]:
    """When each entry of an order starts to run: those that take no time, when the one before them has ended."""
    times, rest = list[float](), list(spans)
    now, place = 0.0, 0
    for node in nodes:
        times.append(now)
        if place < len(rest) and rest[place].node is node:
            now, place = rest[place].end, place + 1
    return times


def _slice(span: Span, c: Compilation) -> Slice:
    node, facts = span.node, lowered(span.node)
    collective, place = collective_of(node), origin_of(node)
    kind = collective.name if collective is not None else name_of(node.target)
    told: dict[str, Any] = {"value": f"%{node.name}", "place": where(node), "phase": place.phase}
    if facts.layout is not None:
        told["layout"] = f"{SHORT_DTYPES[dtype_of(node)]}{facts.layout.simplify(c.mesh)}"
    if collective is not None:
        told["bytes"] = sum(operand_bytes(node, c.mesh))
    if span.waits and span.track == COMPUTE:
        kind = f"wait for {kind}"
    return Slice(span.track, place.module, kind, span.start, span.end, told)


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
    for track, tid in numbers.items():
        title = track if track == COMPUTE else f"axis {track}"
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": title}}
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}
    for one in process.slices:
        yield {
            "ph": "X", "pid": pid, "tid": numbers[one.track], "cat": one.track,
            "name": f"{one.module}: {one.kind}" if one.module else one.kind,
            "ts": one.start * MICROSECONDS, "dur": (one.end - one.start) * MICROSECONDS, "args": one.told,
        }  # fmt: skip
    for second, size in process.held:
        yield {"ph": "C", "pid": pid, "name": "memory", "ts": second * MICROSECONDS, "args": {"bytes": size}}
