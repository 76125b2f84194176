"""A compilation as `schedule` ordered it: what runs in which order, and what is held and when meanwhile."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from shardc.analysis.memory import MemoryAnalysis
from shardc.analysis.recorded_step import RecordedStep, recorded_step
from shardc.analysis.timeline import Order, Times
from shardc.ir.partition import Partition, partition
from shardc.planning.compilation import Compilation


class Scheduled(NamedTuple):
    """Both halves of the bucketed graph in the order of the schedule, and the analysis of what they hold."""

    run: Partition
    forward: Order
    backward: Order
    memory: MemoryAnalysis


def scheduled(c: Compilation) -> Scheduled:
    """What runs in a compilation that `schedule` has left."""
    graph = c.schedule.bucketed.read()
    run = partition(graph, c.program)
    by_name: dict[str, fx.Node] = {node.name: node for node in graph.nodes}
    order: Order = [(by_name[name], awaited) for name, awaited in c.schedule.order]
    first = set(run.forward)
    forward, backward = ([entry for entry in order if (entry[0] in first) is half] for half in (True, False))
    return Scheduled(run, forward, backward, MemoryAnalysis(graph, run, c.program, c.mesh, c.states))


def seconds_once(c: Compilation) -> float:
    """Seconds of what runs once a step, before and behind all micro-batches."""
    parts = (c.prologue, c.epilogue if c.program.microbatches is not None else None)
    return sum(one.schedule.seconds for one in parts if one is not None)


def step_seconds(c: Compilation) -> float:
    """Seconds of a step of a compilation that `schedule` has left."""
    return c.program.turns * c.schedule.seconds + seconds_once(c)


def recorded(c: Compilation) -> RecordedStep:
    """The step of a compilation that `schedule` has left."""
    found = scheduled(c)
    return recorded_step(found.forward, found.backward, Times(found.run, c.pace), found.memory)
