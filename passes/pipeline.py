"""The list of passes, in order, and the one function that runs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple, TypeVar

from torch import fx

from shardc.analysis.conversions import Conversion
from shardc.analysis.memory import Memory
from shardc.analysis.timeline import Pace
from shardc.cost.buckets import Buckets
from shardc.cost.hardware import Hardware
from shardc.cost.memory import NO_STATES, States
from shardc.explain.plan import Placed, Plan, Tried
from shardc.explain.unruled import refuse_unknown, tried
from shardc.explain.why import Priced, Questions, titles_of
from shardc.ir.constrain import Dim
from shardc.ir.layout import SHORT_DTYPES, Layout
from shardc.ir.mesh import Mesh
from shardc.ir.partition import partition
from shardc.ir.printing import Shown
from shardc.ir.program import Port, Program, Role, where
from shardc.passes.assign import Budget, assign, assign_within
from shardc.passes.bucket import bucket
from shardc.passes.codegen import codegen
from shardc.passes.localize import localize
from shardc.passes.normalize import normalize
from shardc.passes.propagate import Constraint, collect, propagate
from shardc.passes.reshard import reshard
from shardc.passes.retile import retile
from shardc.passes.schedule import schedule, smallest
from shardc.planning.cost_network import Accepts, Assignment, CostNetwork
from shardc.planning.reuse_strategies import Choice, reuse_strategies
from shardc.rules.factors.factored import Factored, Key
from shardc.rules.factors.factoring import factor
from shardc.rules.factors.strategy import make
from shardc.runtime.collectives.collective import AnyCollective
from shardc.solver.solve import Solution

Result = TypeVar("Result")
Layouts = dict[fx.Node, Layout]
PASSES = (
    "capture", "normalize", "retile", "propagate", "assign", "reshard", "localize", "bucket", "overlap", "codegen",
)  # fmt: skip


@dataclass
class Lowered:
    """What the pipeline made: the plan, the generated source and the printout after every pass (made when they are
    asked for), the captured program, and the local graph that the source is written from (node metadata as `reshard`
    leaves it)."""

    plan: Plan
    code: Callable[[], str]
    graphs: Mapping[str, Callable[[], str]]
    program: Program
    graph: fx.Graph
    choice: Choice


@dataclass(frozen=True)
class Settings:
    """What the user asked for, resolved."""

    mesh: Mesh
    device: Hardware
    mode: str
    whole_outputs: bool
    parameters: Sequence[tuple[Port, tuple[Dim, ...], str]]
    on_unknown: str = "replicate"
    memory: float | None = None
    states: States = NO_STATES


def lower(
    program: Program, settings: Settings, phases: dict[str, float], known: Choice | None = None, planned_at: str = ""
) -> Lowered:
    """Run every pass after capture. With `known`, the choice for the same program at the sizes `planned_at`, nothing
    is solved if that can be adopted."""
    mesh, graphs = settings.mesh, dict[str, Callable[[], str]]()

    def timed(name: str, work: Callable[[], Result]) -> Result:
        start = time.process_time()
        result = work()
        phases[name] = phases.get(name, 0.0) + time.process_time() - start
        return result

    graphs["capture"] = Shown(program.graph, mesh)
    timed("normalize", lambda: normalize(program))
    planned = graphs["normalize"] = Shown(program.graph, mesh)
    factored = timed("factor", lambda: factor(program))
    if timed("retile", lambda: retile(factored, mesh, settings.parameters)):
        factored = timed("factor", lambda: factor(program))
        planned = Shown(program.graph, mesh)
    if settings.on_unknown == "error":
        refuse_unknown(factored)
    graphs["retile"] = planned
    constraints = collect(factored, mesh, settings.parameters)
    spread = timed("propagate", lambda: propagate(factored, mesh, constraints))
    graphs["propagate"] = lambda: planned(_spread(factored, spread.axes))
    wishes = spread.wishes() if settings.mode == "propagate" else {}
    localized = Localized(program, settings)
    network, assignment, solution = timed(
        "assign", lambda: _choose(factored, settings, spread.accepts(), wishes, known, localized)
    )
    graphs["assign"] = lambda: planned(_spread(factored, spread.axes) | _chosen(network, assignment))
    lowered, titles, unknown = timed("reshard", lambda: localized(network, assignment))
    pace = Pace(network, settings.device)

    def again() -> fx.Graph:
        return localize(reshard(network, assignment), mesh)

    arranged = timed("arrange", lambda: schedule(lowered, again, program, pace, settings.states, settings.memory))
    graph = arranged.graph
    graphs["reshard"] = lambda: Shown(reshard(network, assignment), mesh)()
    graphs["localize"] = lambda: Shown(again(), mesh)()
    graphs["bucket"] = lambda: Shown(arranged.bucketed(), mesh)()
    graphs["overlap"] = lambda: Shown(graph, mesh)()
    memory, beneath = replace(arranged.memory, budget=settings.memory), arranged.hidden
    conversions = _conversions(graph, pace, titles)
    compute = _compute(network, assignment)
    explainer = _explainer(
        network, assignment, solution, settings, constraints, titles, conversions, compute, arranged.apart
    )
    code = graphs["codegen"] = cache(lambda: codegen(graph, program, mesh))
    notes = [*_padded(program, graph, mesh), *(f"conflict: {c}" for c in spread.conflicts)]
    if solution is None:
        notes.append(f"the layouts were planned at {planned_at}; at the sizes of this call no bound was proved")
    plan = _plan(
        settings, program, graph, conversions, compute, solution, notes, phases, unknown, explainer, memory, beneath
    )
    return Lowered(plan, code, graphs, program, graph, Choice(factored, assignment))


class _Local(NamedTuple):
    """A localized graph, and what is said of its values and unknown operators."""

    graph: fx.Graph
    titles: Mapping[Key, str]
    unknown: tuple[Tried, ...]


class Localized:
    """Reshard and localize, of an assignment. The last is remembered: the plan that was measured is most often the plan
    that is taken. Its graph may be changed by whoever takes it then."""

    def __init__(self, program: Program, settings: Settings) -> None:
        self.program, self.settings = program, settings
        self._last: tuple[Assignment, _Local] | None = None

    def peak(self, network: CostNetwork, assignment: Assignment) -> float:
        """The bytes that a device holds at most that runs an assignment, without buckets and overlap."""
        graph = self(network, assignment).graph
        return smallest(graph, self.program, self.settings.mesh, self.settings.states)

    def __call__(self, network: CostNetwork, assignment: Assignment) -> _Local:
        if self._last is None or self._last[0] is not assignment:
            self._last = assignment, self._made(network, assignment)
        return self._last[1]

    def _made(self, network: CostNetwork, assignment: Assignment) -> _Local:
        graph, unknown = reshard(network, assignment), tuple[Tried, ...]()
        titles = titles_of(self.program, graph)
        if any(op.learned is not None for op in network.factored.ops):
            conversions = _conversions(graph, Pace(network, self.settings.device), titles)
            unknown = tried(network, assignment, graph, conversions)
        return _Local(localize(graph, self.settings.mesh), titles, unknown)


def _choose(
    factored: Factored, settings: Settings, accepts: Mapping[Key, Accepts], wishes: Mapping[Key, Sequence[Accepts]],
    known: Choice | None, localized: Localized,
) -> tuple[CostNetwork, Assignment, Solution | None]:  # fmt: skip
    if known is not None:
        network = CostNetwork(factored, settings.mesh, settings.device, accepts, settings.whole_outputs)
        adopted = reuse_strategies(network, known)
        fits = settings.memory is None or (adopted and localized.peak(network, adopted) <= settings.memory)
        if adopted is not None and fits:
            return network, adopted, None
    asked = (factored, settings.mesh, settings.device, accepts, settings.whole_outputs, wishes)
    if settings.memory is None:
        return assign(*asked)
    return assign_within(*asked, Budget(settings.memory, settings.states), localized.peak)


def _spread(factored: Factored, axes: Mapping[Key, list[tuple[str, ...]]]) -> Layouts:
    """The layouts of values as constraints spread, by node."""
    return {node: value.form.layout_on(tuple(axes[value.key])) for node, value in factored.values.items()}


def _chosen(network: CostNetwork, assignment: Assignment) -> Layouts:
    """The layouts in which operators make their results, by node."""
    found: Layouts = {}
    for op in network.factored.ops:
        for index, result in enumerate(op.results):
            splits = make(assignment.shapes[op.node], assignment.strategies[op.node], index, network.mesh)
            layout = result.value.form.layout_on(splits.axes, splits.partial)
            named = (op.node, *op.node.users)  # the results of an operator that has several
            found |= {node: layout for node in named if network.factored.values.get(node) is result.value}
    return found


def _conversions(graph: fx.Graph, pace: Pace, titles: Mapping[Key, str]) -> tuple[Conversion, ...]:
    """All that is sent, and the local steps of conversions, in order."""
    found: list[Conversion] = []

    def add(node: fx.Node, kind: AnyCollective, axis: str, moved: float, seconds: float, value: str) -> None:
        sent, phase = kind.sent(pace.mesh.sizes[axis], moved), node.meta.get("phase", "")
        found.append(Conversion(kind.name, axis, node.name, sent, seconds, phase, where(node), value))

    for node in graph.nodes:
        if "op" in node.meta:
            for kind, axis, moved, seconds in pace.operator(node)[1]:
                add(node, kind, axis, moved, seconds, titles.get((node.meta["op"].node, 0), node.name))
            continue
        step = pace.step(node)
        if step is not None:
            more = f" and {len(node.meta['members']) - 1} more" if "members" in node.meta else ""
            add(node, step[0], str(node.kwargs["axis"]), *step[1:], titles[node.meta["base"]] + more)
    return tuple(found)


def _explainer(
    network: CostNetwork, assignment: Assignment, solution: Solution | None, settings: Settings,
    constraints: Sequence[Constraint], titles: Mapping[Key, str], conversions: tuple[Conversion, ...], compute: float,
    apart: bool,
) -> Questions:  # fmt: skip
    """What the plan asks when it is asked."""

    def price(other: Assignment) -> Priced:
        graph = localize(reshard(network, other), settings.mesh)
        bucket(graph, partition(graph, network.factored.program), Buckets(settings.mesh, settings.device), apart)
        return _conversions(graph, Pace(network, settings.device), titles), _compute(network, other)

    return Questions(network, assignment, solution, settings.mode, constraints, conversions, compute, price, titles)


def _compute(network: CostNetwork, assignment: Assignment) -> float:
    total = 0.0
    for op in network.factored.ops:
        strategy = assignment.strategies[op.node]
        total += network.options_of(op).compute_of(strategy) * (2 if strategy.again else 1)
    return total


def _plan(
    settings: Settings, program: Program, graph: fx.Graph, conversions: tuple[Conversion, ...], compute: float,
    solution: Solution | None, notes: Sequence[str], phases: dict[str, float], unknown: tuple[Tried, ...],
    explainer: Questions, memory: Memory, beneath: float,
) -> Plan:  # fmt: skip
    mesh = settings.mesh
    local = [node for node in graph.nodes if node.op == "placeholder"]
    placed = [
        Placed(port.role.value, port.name, SHORT_DTYPES[node.meta["dtype"]], node.meta["layout"].simplify(mesh))
        for port, node in zip(program.inputs, local, strict=True)
        if port.role in (Role.PARAMETER, Role.INPUT)
    ]
    layouts = {n.name: n.meta["layout"].simplify(mesh) for n in graph.nodes if n.meta.get("layout") is not None}
    cost, bound = compute + sum(c.seconds for c in conversions) - beneath, 0.0
    if solution is not None:
        cost, bound = solution.cost, solution.lower_bound
    return Plan(
        mesh, settings.device.name, settings.mode, tuple(placed), layouts, conversions, compute, cost, bound,
        tuple(notes), phases, unknown, explainer, memory, beneath,
    )  # fmt: skip


def _padded(program: Program, graph: fx.Graph, mesh: Mesh) -> list[str]:
    """Dims of parameters and inputs that the plan pads."""
    notes: list[str] = []
    local = [node for node in graph.nodes if node.op == "placeholder"]
    for port, node in zip(program.inputs, local, strict=True):
        if port.role not in (Role.PARAMETER, Role.INPUT):
            continue
        for index, dim in enumerate(node.meta["layout"].dims):
            for atom in dim:
                ways = mesh.ways(atom.axes)
                if atom.size % ways:
                    axes, chunk = ",".join(atom.axes), mesh.chunk(atom.size, atom.axes)
                    notes.append(f"{port.name} dim {index}: {atom.size} over {axes} is padded to {ways} x {chunk}")
    return notes
