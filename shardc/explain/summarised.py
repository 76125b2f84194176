"""From a compilation to the summary of its plan."""

from __future__ import annotations

import math
from collections.abc import Mapping

from shardc.analysis.axis_roles import parallelism_of
from shardc.explain.summary import Summary
from shardc.ir.program import Role, tensor_of
from shardc.planning.compilation import Compilation
from shardc.planning.recompute_network import RecomputeNetwork
from shardc.rules.factors.bodies import work
from shardc.rules.factors.factored import Kind
from shardc.rules.factors.strategy import Shape, Strategy
from shardc.runtime.collectives.all_reduce import all_reduce


def summary_of(c: Compilation, seconds: float) -> Summary:
    """The summary of a plan of which a step takes `seconds`; `c` is the compilation after `overlap`."""
    device, mesh = c.options.device, c.mesh
    rows, unit = _rows(c)
    flops, ideal = _products(c)
    links = {
        axis: "between nodes" if device.wires(mesh, axis, all_reduce).nodes > 1 else "inside a node"
        for axis, ways in mesh.axes if ways > 1
    }  # fmt: skip
    return Summary(
        mesh, device.name, parallelism_of(c.lowered.read(), c.factored, mesh), seconds, rows, unit, flops,
        ideal / (mesh.size * seconds) if seconds else 0.0, c.schedule.memory.peak,
        device.memory if math.isfinite(device.memory) else 0.0, c.options.budget,
        isinstance(c.network, RecomputeNetwork) and c.network.recompute, _spent(c, seconds), links,
    )  # fmt: skip


def _rows(c: Compilation) -> tuple[int, str]:
    """How many tokens a step takes, or samples."""
    ports = zip(c.program.inputs, c.program.placeholders, strict=True)
    inputs = [tensor_of((node, 0)) for port, node in ports if port.role is Role.INPUT]
    times = c.program.turns
    for one in inputs:
        if one.dim() == 2 and not one.is_floating_point() and not one.is_complex():
            return times * int(one.numel()), "tokens"
    return next((times * int(one.shape[0]) for one in inputs if one.dim()), 0), "samples"


def _products(c: Compilation) -> tuple[float, float]:
    """The flops of the program's matrix products on one device, and the seconds that they take there at its peak."""
    flops = ideal = 0.0
    known: dict[Kind, float] = {}
    for op in c.factored.ops:
        if op.rule.flops:
            shape = c.assignment.shapes[op.node]
            if op.kind not in known:
                known[op.kind] = work(shape, Strategy(((),) * len(shape.factors)), c.mesh)[0]
            flops += known[op.kind]
            ideal += known[op.kind] / c.options.device.rate(shape.dtype)
    return c.program.turns * flops, c.program.turns * ideal


def _spent(c: Compilation, seconds: float) -> Mapping[str, float]:
    """The seconds of a step by what takes them."""
    device = c.options.device
    known: dict[tuple[Kind, Strategy], tuple[str, float]] = {}
    spent = {"arithmetic": 0.0, "memory bandwidth": 0.0, "launches": 0.0}
    for op in c.factored.ops:
        shape, strategy = c.assignment.shapes[op.node], c.assignment.strategies[op.node]
        if not shape.computes:
            continue
        if (op.kind, strategy) not in known:
            known[op.kind, strategy] = _limit(shape, strategy, c), c.network.options_of(op).compute_of(strategy)
        limit, taken = known[op.kind, strategy]
        times = c.program.turns * (2 if strategy.again else 1)
        spent[limit] += times * (taken - device.launch)
        spent["launches"] += times * device.launch
    lost = {axis: _lost(c, axis) for axis, ways in c.mesh.axes if ways > 1}
    # what is left are local steps of conversions, and what fills buckets
    spent["memory bandwidth"] += max(seconds - sum(spent.values()) - sum(lost.values()), 0.0)
    return {**spent, **lost}


def _lost(c: Compilation, axis: str) -> float:
    """The seconds of a step that a rank loses on account of an axis."""
    once = sum(one.schedule.lost[axis] for one in (c.prologue, c.epilogue) if one is not None and c.program.turns > 1)
    return c.program.turns * c.schedule.lost[axis] + once


def _limit(shape: Shape, strategy: Strategy, c: Compilation) -> str:
    """What an operator takes its time for, on the roofline."""
    flops, moved = work(shape, strategy, c.mesh)
    device = c.options.device
    return "arithmetic" if flops / device.rate(shape.dtype) > moved / device.memory_bandwidth else "memory bandwidth"
