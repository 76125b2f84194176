"""Mesh search: which sizes of the axes, and in which order, make the cheapest plan for a number of devices."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ParamSpec, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardc.cost.hardware import Hardware
from shardc.errors import MeshError, ShardcError
from shardc.explain.plan_file.cache import WORTH, cached_at
from shardc.explain.records import keep_record, read_record
from shardc.explain.summarised import summary_of
from shardc.explain.summary import Summary
from shardc.inspect.progress import tracked, working
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import Inputs, ModelCall
from shardc.ir.printing import in_bytes, in_seconds
from shardc.ir.program import Role
from shardc.ir.report import Columns, Report, Section
from shardc.options import AUTO, SearchOptions, as_keywords
from shardc.passes.assign import TooSlowError, first_network
from shardc.passes.capture import TRACING
from shardc.passes.pipeline import part, run
from shardc.planning.compilation import Compilation
from shardc.planning.cost_network import Assignment, CostNetwork
from shardc.planning.gc_pause import gc_paused
from shardc.planning.out_of_memory import OutOfMemoryError, refuse_too_large
from shardc.planning.scheduled import step_seconds
from shardc.rules.factors.strategy import make
from shardc.runtime.collectives.all_reduce import all_reduce
from shardc.solver.proof.certificate import Certificate, check

Keywords = ParamSpec("Keywords")
CONSTRAIN = torch.ops.shardc.constrain.default


@dataclass(frozen=True)
class Candidate:
    """One mesh: the seconds of its best plan, the bound that none beats, the bytes that a device stores, and the
    CPU-seconds spent. Without a plan `cost` is infinite and `remark` says why. `summary` is there where memory is
    bounded: only then is the program lowered."""

    mesh: Mesh
    cost: float
    lower_bound: float
    stored: float
    spent: float
    remark: str = ""
    summary: Summary | None = None
    near: bool = False
    """Whether `lower_bound` is that of plans near this one alone: there were too many strategies to offer all."""

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
    """Whether memory is bounded: then `stored` is the peak of the plan, `plan.memory.peak`; else parameters and their
    gradients."""

    @property
    def best(self) -> Mesh:
        """The mesh of the cheapest plan."""
        return self.ranked[0].mesh

    def __str__(self) -> str:
        return str(self.report())

    def report(self) -> Report:
        """What `print(search)` shows, in sections."""
        stored = "held" if self.bounded else "stored"
        rows = [["mesh", "a step", "gap", "MFU", stored, "CPU", "why not"]]
        for one in self.ranked:
            gap = f"{one.gap:.1%} near it" if one.near else "optimal" if one.gap < 1e-6 else f"{one.gap:.1%}"
            mfu = f"{one.summary.mfu:.1%}" if one.summary else "-"
            known = [in_seconds(one.cost), gap, mfu, in_bytes(one.stored)] if math.isfinite(one.cost) else ["-"] * 4
            rows.append([str(one.mesh), *known, f"{one.spent:.1f} s", one.remark or _slower(one, self.ranked[0])])
        head = f"{len(self.ranked)} meshes of {self.devices} devices on {self.hardware}, the cheapest plan first"
        means = "the most at any time" if self.bounded else "parameters and their gradients"
        tail = f"{stored}: {means} on one device; capture, shared by all, {self.shared:.1f} s"
        best = self.ranked[0].summary
        does = [] if best is None else [*(line.strip() for line in best.figures()), *best.parallelism.lines]
        sections = [Section("", Columns(rows, "<>>>>><")), *([Section(f"the best: {self.best}", does)] if does else [])]
        return Report([head], sections, [tail])


def _slower(one: Candidate, best: Candidate) -> str:
    """What a plan takes longer for than the best."""
    if one is best or one.summary is None or best.summary is None:
        return ""
    here, there = _shares(one.summary), _shares(best.summary)
    more = {name: seconds - there.get(name, 0.0) for name, seconds in here.items()}
    worst = max(more, key=lambda name: more[name])
    if more[worst] <= 0.001 * best.cost:
        return "about as fast"
    link = f" ({one.summary.links[worst]})" if worst in one.summary.links else ""
    again = ", to fit into memory" if worst == COMPUTING and one.summary.memory_binds else ""
    return f"{worst}{link} takes {in_seconds(more[worst])} more{again}"


COMPUTING, TOO_LARGE = "computing", "does not fit"


def _shares(summary: Summary) -> Mapping[str, float]:
    """The seconds of a step that a rank computes, and those that it loses on account of every axis."""
    lost = {axis: summary.spent[axis] for axis in summary.links}
    return {COMPUTING: sum(summary.spent.values()) - sum(lost.values()), **lost}


class SearchMesh(Protocol[Keywords]):
    """`search_mesh` as type checkers see it: with the options as keywords."""

    def __call__(
        self, model: nn.Module, devices: int, example_inputs: Inputs, *args: Keywords.args, **options: Keywords.kwargs
    ) -> MeshSearch: ...


def search(call: ModelCall, devices: int, options: SearchOptions) -> MeshSearch:
    """`search_mesh` for a call, with its options in one."""
    if devices < 1 or not options.axes:
        raise MeshError(f"cannot spread {devices} devices over {len(options.axes)} axes; both must be 1 or more")
    if options.dynamic:
        raise ShardcError("dynamic= has no meaning for a search: name the sizes to plan for")
    if options.microbatches == AUTO:
        raise ShardcError("microbatches='auto' has no meaning for a search: name a number; a plan may choose one")
    if options.plan is not None:
        raise ShardcError("plan= has no meaning for a search: it looks for plans")
    if any(isinstance(parameter, DTensor) for parameter in call.model.parameters()):
        raise MeshError("the parameters are stored on a mesh already; search before the model is distributed")
    start = time.process_time()
    with working("capturing"):
        shared = _captured(Compilation(call, Mesh(((options.axes[0], devices),)), options))
    taken = time.process_time() - start
    kept = cached_at(replace(shared, time_limit=options.time_limit), "search", devices, list(options.axes))
    if kept is not None and (found := read_record(kept, MeshSearch)) is not None:
        return replace(found, shared=taken)
    if options.budget is not None:
        refuse_too_large(shared, options.budget, devices)
    annotated = bool(options.constraints) or any(node.target is CONSTRAIN for node in shared.program.graph.nodes)
    candidates = _planned(
        replace(shared, time_limit=options.time_limit), meshes(devices, options.axes, options.device, annotated)
    )
    candidates.sort(key=lambda one: (one.cost, one.lower_bound))
    if math.isinf(candidates[0].cost):
        way_out = "; a smaller batch or more devices would help" if candidates[0].remark.startswith(TOO_LARGE) else ""
        raise ShardcError(
            f"no mesh of {devices} devices has a plan; {candidates[0].mesh}: {candidates[0].remark}{way_out}"
        )
    made = MeshSearch(options.device.name, devices, tuple(candidates), taken, options.budget is not None)
    if kept is not None and sum(one.spent for one in candidates) >= WORTH:
        keep_record(kept, made)
    return made


def _planned(shared: Compilation, among: Sequence[Mesh]) -> list[Candidate]:
    """A candidate for every mesh. Where the bound on memory is that of the hardware, all are planned without it first.
    Where that does not fit, the fastest are planned within it, until the next could not be better even without."""
    candidates, unfit = list[Candidate](), list[tuple[TooSlowError, Mesh]]()

    def best() -> float:
        return min((one.cost for one in candidates), default=math.inf)

    for mesh in tracked(among, "meshes"):
        try:
            candidates.append(_candidate(replace(shared, mesh=mesh, too_slow=0.0), best()))
        except TooSlowError as error:
            unfit.append((error, mesh))
    for error, mesh in sorted(unfit, key=lambda one: one[0].bound):
        if error.bound >= best():
            candidates.append(Candidate(mesh, math.inf, error.bound, 0.0, 0.0, f"not solved within memory: {error}"))
        else:
            candidates.append(_candidate(replace(shared, mesh=mesh), best()))
    return candidates


def _captured(start: Compilation) -> Compilation:
    """What all meshes share: the passes that do not look at the mesh."""
    with TRACING:
        captured = run(part("capture", "capture"), start)
    return run(part("normalize", "microbatch"), captured)


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


@gc_paused()
def _candidate(c: Compilation, best: float) -> Candidate:
    """Plan for one mesh, unless its bound lies above `best`. Raises TooSlowError for a plan that does not fit, and is
    slower than `c` says is wanted."""
    start, mesh = time.process_time(), c.mesh

    def without(bound: float, remark: str) -> Candidate:
        return Candidate(mesh, math.inf, bound, 0.0, time.process_time() - start, remark)

    try:
        c = run(part("retile", "propagate"), c)
        network = first_network(c)
        bound = c.program.turns * check(network.problem(), Certificate({}))
        if bound >= best and network.offers is None:
            return without(bound, f"not solved: no plan takes less than {in_seconds(bound)}")
        c = run(part("assign", "assign"), replace(c, network=network))
    except TooSlowError:
        raise
    except OutOfMemoryError as error:
        return without(0.0, f"{TOO_LARGE}: {in_bytes(error.least)} at least")
    except ShardcError as error:
        return without(0.0, str(error).splitlines()[0])
    assert c.solution is not None
    times, remark, summary = c.program.turns, "", None
    cost, bound = times * c.solution.cost, times * c.solution.lower_bound
    if c.options.budget is not None:
        c = run(part("reshard", "schedule"), c)
        held, summary = c.schedule.memory.peak, summary_of(c, step_seconds(c))
    else:
        held, memory = _stored(c.network, c.assignment), c.options.device.memory
        remark = f"more than the {in_bytes(memory)} of a device" if held > memory else ""
    near = c.network.offers is not None
    return Candidate(mesh, cost, bound, held, time.process_time() - start, remark, summary, near)


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


def _search_mesh(model: nn.Module, devices: int, example_inputs: Inputs, options: SearchOptions) -> MeshSearch:
    """Plan for every mesh of `devices` devices over at most the given axes, in their order, and rank the plans.

    The model is captured once. Meshes that the hardware cannot tell apart are planned once: where no constraint names
    an axis, only its size and its links matter. A mesh whose bound lies above the best plan so far is not solved.
    Raises ShardcError, also where no mesh has a plan.
    """
    return search(ModelCall.of(model, example_inputs), devices, options)


def _search_function(options: Callable[Keywords, SearchOptions]) -> SearchMesh[Keywords]:
    return as_keywords("search_mesh", _search_mesh, SearchOptions)


search_mesh = _search_function(SearchOptions)
