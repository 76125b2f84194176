"""From a compilation to its plan: layouts, conversions, costs, notes, and what answers questions about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from shardc.analysis.conversions import Conversion
from shardc.analysis.timeline import Pace
from shardc.explain.advice import Rest, advice_on, scheduled_alone
from shardc.explain.causes import Causes
from shardc.explain.explanations import Explainer
from shardc.explain.plan import Placed, Plan, Tried
from shardc.explain.posed import PosedWhenAsked
from shardc.explain.summarised import summary_of
from shardc.explain.unruled import tried
from shardc.explain.why import Priced, Questions
from shardc.ir.facts import Key, dtype_of, laid, lowered, origin_of
from shardc.ir.layout import SHORT_DTYPES
from shardc.ir.printing import in_seconds
from shardc.ir.program import Role, output_names, where
from shardc.passes.pipeline import part, run
from shardc.planning.compilation import Compilation
from shardc.planning.cost_network import Assignment
from shardc.planning.scheduled import seconds_once, step_seconds
from shardc.rules.factors.chosen import chosen_of
from shardc.runtime.collectives.collective import AnyCollective
from shardc.runtime.kernels.random import DRAWS, INDEPENDENT


def plan_of(snapshots: Mapping[str, Compilation], rest: Rest = scheduled_alone) -> Plan:
    """The plan of a compilation. `snapshots` has the compilation after every pass, by the pass's name. `rest` runs the
    passes behind `LOCAL` for other compilations that advice compares it with."""
    c, graph, mesh = snapshots["overlap"], snapshots["overlap"].lowered.read(), snapshots["overlap"].mesh
    conversions, compute = _conversions(graph, c.pace, c.titles, Causes(c)), _compute(graph, c.pace)
    schedule = c.schedule
    once = _conversions_once(c)
    predicted = step_seconds(c)
    cost, bound = predicted, 0.0
    if c.solution is not None:
        cost, bound = c.solution.cost, c.solution.lower_bound
    elif c.given is not None and c.given.proof is not None:
        cost, bound = c.given.proof.cost, c.given.proof.lower_bound
    if c.program.turns == 1 and not seconds_once(c):
        predicted = compute + sum(one.seconds for one in conversions) - schedule.hidden
    return Plan(
        mesh, c.options.device.name, c.options.mode, _placed(c, graph),
        {node.name: layout.simplify(mesh) for node in _nodes(graph) if (layout := lowered(node).layout)},
        conversions, compute, cost, bound, _notes(c, graph), dict(snapshots["codegen"].seconds),
        _tried(snapshots["reshard"]), _questions(snapshots, conversions, compute), schedule.memory, schedule.hidden,
        _outputs(c, graph), lambda: summary_of(c, predicted), lambda: advice_on(snapshots, rest),
        max(0.0, _compute_of_strategies(c) - compute), c.program.turns, seconds_once(c), once,
        c.network.offers is not None,
    )  # fmt: skip


def _conversions_once(c: Compilation) -> tuple[Conversion, ...]:
    """The conversions of what runs once a step, or behind the last of several backwards."""
    found: list[Conversion] = []
    for one in (c.prologue, c.epilogue):
        if one is not None:
            titles = {**one.titles, **c.titles}
            found += [replace(each, phase="once") for each in _conversions(one.lowered.read(), one.pace, titles)]
    return tuple(found)


def _placed(c: Compilation, graph: fx.Graph) -> tuple[Placed, ...]:
    """The layouts of parameters and inputs."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return tuple(
        Placed(port.role.value, port.name, SHORT_DTYPES[dtype_of(node)], laid(node).simplify(c.mesh))
        for port, node in zip(c.program.inputs, placeholders, strict=True)
        if port.role in (Role.PARAMETER, Role.INPUT)
    )


def _outputs(c: Compilation, graph: fx.Graph) -> tuple[Placed, ...]:
    """The layouts of outputs, in the order of the user's structure."""
    made: list[fx.Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    return tuple(
        Placed(Role.OUTPUT.value, name, SHORT_DTYPES[dtype_of(made[leaf])], laid(made[leaf]).simplify(c.mesh))
        for name, leaf in zip(output_names(c.program.out_spec), c.program.out_leaves, strict=False)  # see Program
        if isinstance(leaf, int)
    )


def _left_split(c: Compilation, graph: fx.Graph) -> list[str]:
    """A note on the outputs that come back as they lie."""
    split = [one for one in _outputs(c, graph) if any(atom.axes for dim in one.layout.dims for atom in dim)]
    if not split:
        return []
    more = f" and {len(split) - 1} more" if len(split) > 1 else ""
    comes, they = ("come", "They are DTensors") if more else ("comes", "It is a DTensor")
    return [
        f"{split[0].name}{more} {comes} back split, since nobody asked for the whole. {they} under torch.distributed, "
        "where full_tensor() gathers one; outputs='full' gathers all"
    ]


def _notes(c: Compilation, graph: fx.Graph) -> tuple[str, ...]:
    notes = [
        *_padded(c, graph),
        *_left_split(c, graph),
        *_random(c),
        *(f"conflict: {conflict}" for conflict in c.spread.conflicts),
    ]
    if c.program.microbatches is not None:
        notes.append(
            f"layouts, sizes and times are those of one of {c.program.microbatches.count} micro-batches, which run one "
            "after another"
        )
    elif c.epilogue is not None:
        notes.append(
            f"gradients are added up over several calls, and reduced once behind the last, in "
            f"{in_seconds(c.epilogue.schedule.seconds)}"
        )
    if c.network.offers is not None:
        notes.append(
            f"operators have too many strategies on {c.mesh} to try all: the bound is that of plans in which each "
            "operator's is near the one that it has here"
        )
    if c.given is not None and c.given.proof is None:
        notes.append(
            f"{c.given.source} was edited: what it says was held fixed, and the solver chose the rest; the bound is "
            "that of plans that say the same"
        )
    elif c.solution is None and c.given is None:
        notes.append(f"the layouts were planned at {c.reuse_at}; at the sizes of this call no bound was proved")
    return tuple(notes)


def _random(c: Compilation) -> list[str]:
    """A note on whose random numbers are drawn, if any are."""
    if all(node.target not in DRAWS for node in c.program.graph.nodes):
        return []
    if c.randomness == INDEPENDENT:
        return ["randomness is independent: every device draws its part from seeds; 'exact' draws as a single device"]
    return ["randomness is exact: the numbers are those of a single device; 'independent' costs less on accelerators"]


def _padded(c: Compilation, graph: fx.Graph) -> list[str]:
    """A note for every dim of a parameter or an input that the plan pads."""
    notes: list[str] = []
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for port, node in zip(c.program.inputs, placeholders, strict=True):
        if port.role not in (Role.PARAMETER, Role.INPUT):
            continue
        for index, dim in enumerate(laid(node).dims):
            for atom in dim:
                ways = c.mesh.ways(atom.axes)
                if atom.size % ways:
                    axes, chunk = ",".join(atom.axes), c.mesh.chunk(atom.size, atom.axes)
                    notes.append(f"{port.name} dim {index}: {atom.size} over {axes} is padded to {ways} x {chunk}")
    return notes


def _tried(resharded: Compilation) -> tuple[Tried, ...]:
    """Entries for operators without a rule. They need the resharded graph, which is written again where there are
    any."""
    if all(op.learned is None for op in resharded.factored.ops):
        return ()
    graph = resharded.lowered.read()
    conversions = _conversions(graph, Pace(resharded.mesh, resharded.options.device), resharded.titles)
    return tried(resharded.network, resharded.assignment, graph, conversions)


def _conversions(
    graph: fx.Graph, pace: Pace, value_names: Mapping[Key, str], causes: Causes | None = None
) -> tuple[Conversion, ...]:
    """All collectives, and the local steps of conversions, in the order of the graph, with their `causes`."""
    conversions: list[Conversion] = []

    def add(node: fx.Node, kind: AnyCollective, axis: str, moved: float, seconds: float, value: str) -> None:
        sent, phase, chosen = kind.sent(pace.mesh.sizes[axis], moved), origin_of(node).phase, chosen_of(node)
        cause = "" if causes is None else causes.of_step(node) if chosen is None else causes.of_body(chosen)
        conversions.append(Conversion(kind.name, axis, node.name, sent, seconds, phase, where(node), value, cause))

    for node in _nodes(graph):
        chosen = chosen_of(node)
        if chosen is not None:
            for kind, axis, moved, seconds in pace.operator(chosen).sent:
                add(node, kind, axis, moved, seconds, value_names.get((chosen.op.node, 0), node.name))
            continue
        step = pace.step(node)
        if step is not None:
            facts = lowered(node)
            assert facts.base is not None
            more = f" and {len(facts.members) - 1} more" if facts.members else ""
            add(node, step[0], str(node.kwargs["axis"]), *step[1:], value_names[facts.base] + more)
    return tuple(conversions)


def _nodes(graph: fx.Graph) -> list[fx.Node]:
    """All nodes but the output, which has no facts."""
    return [node for node in graph.nodes if node.op != "output"]


def _compute(graph: fx.Graph, pace: Pace) -> float:
    """Seconds of compute of a rank in a step, in the operators of a lowered graph."""
    return sum([pace.operator(chosen).compute for node in _nodes(graph) if (chosen := chosen_of(node)) is not None])


def _compute_of_strategies(c: Compilation) -> float:
    """The same of all operators with their strategies, as the solver's objective charges them."""
    total = 0.0
    for op in c.factored.ops:
        strategy = c.assignment.strategies[op.node]
        total += c.network.options_of(op).compute_of(strategy) * (2 if strategy.again else 1)
    return total


def _questions(snapshots: Mapping[str, Compilation], conversions: Sequence[Conversion], compute: float) -> Explainer:
    """The object that answers questions about the plan."""
    decided = snapshots["schedule"]

    def price(other: Assignment) -> Priced:
        """The conversions and the compute of another assignment, with the buckets of this plan."""
        again = [*part("reshard", "simplify"), *part("bucket", "bucket")]
        c = run(again, replace(decided, assignment=other, draft=None))
        graph = c.lowered.read()
        return _conversions(graph, c.pace, c.titles), _compute(graph, c.pace)

    def questions(c: Compilation) -> Questions:
        return Questions(c, tuple(conversions), compute, price)

    if decided.solution is None and decided.given is not None and decided.given.proof is not None:
        return PosedWhenAsked(decided, decided.given.proof, questions)
    return questions(decided)
