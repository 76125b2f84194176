"""Mesh search: which sizes of the axes, and in which order, make the cheapest plan for a number of devices."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from shardc.api import request_of
from shardc.compiled import TRACING, ModelCall, captured
from shardc.cost.hardware import Hardware
from shardc.errors import MeshError, ShardcError
from shardc.explain.unruled import refuse_unknown
from shardc.ir.constrain import Spec
from shardc.ir.mesh import Mesh
from shardc.ir.printing import columns, in_bytes, in_seconds
from shardc.ir.program import Program, Role
from shardc.passes.assign import Budget, assign_within, network_of, solved
from shardc.passes.normalize import normalize
from shardc.passes.pipeline import Localized, Settings
from shardc.passes.propagate import collect, propagate
from shardc.passes.retile import retile
from shardc.planning.cost_network import Accepts, Assignment, CostNetwork
from shardc.planning.gc_pause import gc_paused
from shardc.planning.recompute_network import RecomputeNetwork
from shardc.rules.factors.factored import Factored, Key
from shardc.rules.factors.factoring import factor
from shardc.rules.factors.strategy import make
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.solver.proof.certificate import Certificate, check

CONSTRAIN = torch.ops.shardc.constrain.default
TIME_LIMIT = 20.0
"""CPU-seconds for the solver on one mesh."""


@dataclass(frozen=True)
class Candidate:
    """One mesh: the seconds of its best plan, the bound that none beats, the bytes that a device stores, and the
    CPU-seconds spent. Without a plan `cost` is infinite and `remark` says why."""

    mesh: Mesh
    cost: float
    lower_bound: float
    stored: float
    spent: float
    remark: str = ""

    @property
    def gap(self) -> float:
        """By how much a better plan could beat this one, at most, as a part of its cost."""
        return (self.cost - self.lower_bound) / self.cost if math.isfinite(self.cost) and self.cost else 0.0


@dataclass(frozen=True)
class MeshSearch:
    """What was tried, the cheapest first. `print(search)` shows the table."""

    hardware: str
    devices: int
    ranked: tuple[Candidate, ...]
    shared: float
    """CPU-seconds of what all meshes share: capture, normalize, factor."""
    bounded: bool = False
    """Whether memory is bounded: then `stored` is all that a device holds at once, as the planner reckons it; else
    parameters and their gradients."""

    @property
    def best(self) -> Mesh:
        """The mesh of the cheapest plan."""
        return self.ranked[0].mesh

    def __str__(self) -> str:
        stored = "held" if self.bounded else "stored"
        rows = [["mesh", "a step", "gap", stored, "CPU", ""]]
        for one in self.ranked:
            gap = "optimal" if one.gap < 1e-6 else f"{one.gap:.1%}"
            known = [in_seconds(one.cost), gap, in_bytes(one.stored)] if math.isfinite(one.cost) else ["-", "-", "-"]
            rows.append([str(one.mesh), *known, f"{one.spent:.1f} s", one.remark])
        head = f"{len(self.ranked)} meshes of {self.devices} devices on {self.hardware}, the cheapest plan first"
        means = "the most at any time" if self.bounded else "parameters and their gradients"
        tail = f"{stored}: {means} on one device; capture, shared by all, {self.shared:.1f} s"
        return "\n".join([head, "", *(f"  {line}" for line in columns(rows, "<>>>><")), "", tail])


def search_mesh(
    model: nn.Module,
    devices: int,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    axes: Sequence[str] = ("dp", "tp"),
    mode: str = "auto",
    constraints: Mapping[str, Spec] | None = None,
    hardware: str | Path | Hardware | None = None,
    outputs: str = "full",
    on_unknown: str = "replicate",
    memory: float | str | None = None,
    optimizer: float | str | None = None,
    time_limit: float = TIME_LIMIT,
) -> MeshSearch:
    """Plan for every mesh of `devices` devices over at most these axes, in their order, and rank the plans.

    The model is captured once. Meshes that the hardware cannot tell apart are planned once: where no constraint names
    an axis, only its size and its links matter. A mesh whose bound lies above the best plan so far is not solved. Of
    the options, those that `compile` has mean the same; `time_limit` is the solver's where memory is not bounded, in
    CPU-seconds a mesh.
    Raises ShardcError, also where no mesh has a plan.
    """
    if devices < 1 or not axes:
        raise MeshError(f"cannot spread {devices} devices over {len(axes)} axes; both must be 1 or more")
    first = Mesh(((axes[0], devices),))
    request = request_of(first, mode, constraints, hardware, outputs, on_unknown, None, memory, optimizer)
    args, kwargs = ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise MeshError("the parameters are stored on a mesh already; search before the model is distributed")
    found: list[Candidate] = []
    with tqdm(desc="capture", disable=None, leave=False) as bar:
        start = time.process_time()
        with TRACING:
            program, settings, _ = captured(ModelCall(model, args, kwargs), request, {})
        factored = factor(normalize(program))
        if on_unknown == "error":
            refuse_unknown(factored)
        shared = time.process_time() - start
        annotated = bool(constraints) or any(node.target is CONSTRAIN for node in program.graph.nodes)
        wanted = meshes(devices, axes, settings.device, annotated)
        bar.set_description("meshes")
        bar.reset(len(wanted))
        for mesh in wanted:
            best = min((one.cost for one in found), default=math.inf)
            with gc_paused():
                found.append(_candidate(factored, replace(settings, mesh=mesh), time_limit, best))
            bar.update()
    found.sort(key=lambda one: (one.cost, one.lower_bound))
    if math.isinf(found[0].cost):
        raise ShardcError(f"no mesh of {devices} devices has a plan; {found[0].mesh}: {found[0].remark}")
    return MeshSearch(settings.device.name, devices, tuple(found), shared, settings.memory is not None)


def meshes(devices: int, axes: Sequence[str], device: Hardware, annotated: bool) -> list[Mesh]:
    """The meshes worth planning, those of few axes first. With annotations, which name axes, every axis is kept, if
    need be with size 1, and no two meshes are alike."""
    found: dict[object, Mesh] = {}
    for sizes in sorted(factorisations(devices, len(axes)), key=lambda sizes: (sum(n > 1 for n in sizes), sizes)):
        kept = [n for n in sizes if n > 1] or [1]
        mesh = Mesh(tuple(zip(axes, sizes if annotated else kept, strict=False)))
        found.setdefault(sizes if annotated else _wiring(mesh, device), mesh)
    return list(found.values())


def factorisations(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as an ordered product of so many factors."""
    if factors == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        yield from ((first, *rest) for rest in factorisations(number // first, factors - 1))


def _wiring(mesh: Mesh, device: Hardware) -> tuple[tuple[object, ...], ...]:
    """What tells a mesh from another when axes have no names, distance apart: sizes, and links of every axis."""
    parts: list[tuple[object, ...]] = []
    for place, (axis, ways) in enumerate(mesh.axes):
        wires = device.wires(mesh, axis, all_reduce)
        inner = min(device.devices_per_node, math.prod(n for _, n in mesh.axes[place + 1 :]))
        parts.append((ways, wires.near, inner if wires.nodes > 1 else 0))
    return tuple(sorted(parts, key=repr))


def _candidate(factored: Factored, settings: Settings, time_limit: float, best: float) -> Candidate:
    """Plan for one mesh, unless its bound lies above `best`."""
    start, mesh = time.process_time(), settings.mesh

    def without(bound: float, remark: str) -> Candidate:
        return Candidate(mesh, math.inf, bound, 0.0, time.process_time() - start, remark)

    try:
        factored = _retiled(factored, settings)
        spread = propagate(factored, mesh, collect(factored, mesh, settings.parameters))
        wishes = spread.wishes() if settings.mode == "propagate" else {}
        network = network_of(factored, mesh, settings.device, spread.accepts(), settings.whole_outputs, wishes)
        problem = network.problem()
        bound = check(problem, Certificate({}))
        if bound >= best:
            return without(bound, f"not solved: no plan takes less than {in_seconds(bound)}")
        if settings.memory is not None:
            return _within(factored, settings, spread.accepts(), wishes, start)
        solution = solved(problem, time_limit)
    except ShardcError as error:
        return without(0.0, str(error).splitlines()[0])
    stored, memory = _stored(network, network.assignment(solution.choice)), settings.device.memory
    remark = f"more than the {in_bytes(memory)} of a device" if stored > memory else ""
    return Candidate(mesh, solution.cost, solution.lower_bound, stored, time.process_time() - start, remark)


def _within(
    factored: Factored, settings: Settings, accepts: Mapping[Key, Accepts], wishes: Mapping[Key, Sequence[Accepts]],
    start: float,
) -> Candidate:  # fmt: skip
    """Plan for one mesh within the bound on memory."""
    assert settings.memory is not None
    budget, mesh = Budget(settings.memory, settings.states), settings.mesh
    network, _, solution = assign_within(
        factored, mesh, settings.device, accepts, settings.whole_outputs, wishes, budget,
        Localized(factored.program, settings).peak,
    )  # fmt: skip
    assert isinstance(network, RecomputeNetwork)
    held = network.holdings().peak(solution.choice)
    return Candidate(mesh, solution.cost, solution.lower_bound, held, time.process_time() - start)


def _retiled(factored: Factored, settings: Settings) -> Factored:
    """The program with the borders that this mesh needs; where constraints may need any, in a copy."""
    if not settings.parameters:
        return factored
    own = factor(_copied(factored.program))
    return factor(own.program) if retile(own, settings.mesh, settings.parameters) else own


def _copied(program: Program) -> Program:
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(program.graph, new))
    return replace(program, graph=graph)


def _stored(network: CostNetwork, assignment: Assignment) -> float:
    """Bytes of parameters and gradients that a rank holds."""
    program, total = network.factored.program, 0.0
    ports = dict(zip(program.placeholders, program.inputs, strict=True))
    owners = {port.name for port in program.outputs if port.role is Role.GRADIENT}
    for op in network.factored.ops:
        port = ports.get(op.node)
        if port is not None and port.role is Role.PARAMETER:
            held = make(assignment.shapes[op.node], assignment.strategies[op.node], 0, network.mesh)
            copies = 2 if port.name in owners else 1
            total += copies * network.class_of(op.results[0].key).local_bytes(held)
    return total
