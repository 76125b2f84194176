"""Propagate: what the user annotated spreads through the factors of every operator, until nothing changes.

GSPMD (Xu et al. 2021, §3.5) with Shardy's factors. Order: constraints in the order in which they were given;
elementwise operators before all others; a factor takes the longest axes that its operands and results agree on as
prefixes. Closed dims never change.

    %x = input         f32[32@dp, 512]     # annotated
    %w = parameter     f32[512, 64@tp]     # annotated
    %h = mm(%x, %w)    f32[32, 64]         ->   f32[32@dp, 64@tp]
    %y = relu(%h)      f32[32, 64]         ->   f32[32@dp, 64@tp]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardc.ir.layout import is_folded
from shardc.ir.mesh import Mesh
from shardc.ir.program import where
from shardc.planning.compilation import Compilation, compiler_pass
from shardc.planning.constraints import Axes, Constraint, Spread, collect, demanded_leaves
from shardc.rules.factors.factored import Factored, Key, Op
from shardc.runtime.mesh.orders import axis_of


@compiler_pass
def propagate(c: Compilation) -> Compilation:
    """Collect the user's constraints and spread them."""
    constraints = tuple(collect(c.factored, c.mesh, c.demands))
    return replace(c, constraints=constraints, spread=spread(c.factored, c.mesh, constraints))


def spread(factored: Factored, mesh: Mesh, constraints: Sequence[Constraint]) -> Spread:
    """Seed the leaves with the constraints, then let factors carry them to a fixed point."""
    state = Spread(
        {key: [()] * len(value.form.base) for key, value in factored.base.items()},
        {key: [False] * len(value.form.base) for key, value in factored.base.items()},
    )
    origin: dict[tuple[Key, int], str] = {}
    for constraint in constraints:
        _seed(factored, mesh, constraint, state, origin)
    if not constraints:
        return state
    places = {op.node: _places(op) for op in factored.ops}
    elementwise = [op for op in factored.ops if len({op.rule.results[0], *op.rule.operands}) == 1]
    for ops in (elementwise, factored.ops):
        while any([_spread(mesh, op, places[op.node], state, origin) for op in (*ops, *reversed(ops))]):
            pass
    return state


def _seed(
    factored: Factored, mesh: Mesh, constraint: Constraint, state: Spread, origin: dict[tuple[Key, int], str]
) -> None:
    for leaf, held in demanded_leaves(factored, mesh, constraint):
        state.axes[constraint.key][leaf] = held
        state.fixed[constraint.key][leaf] = True
        origin[constraint.key, leaf] = constraint.label


def _spread(
    mesh: Mesh, op: Op, places: list[list[tuple[Key, int]]], state: Spread, origin: dict[tuple[Key, int], str]
) -> bool:
    """Let one operator's factors carry axes between its operands and results; True when something changed."""
    changed = False
    for index, factor in enumerate(op.factors):
        if factor.whole:
            continue
        here = places[index]
        if not here:
            continue
        longest = max(here, key=lambda place: len(state.axes[place[0]][place[1]]))
        best = state.axes[longest[0]][longest[1]]
        if is_folded(best) and axis_of(best[-1]) not in factor.folds:
            continue
        for key, leaf in here:
            held = state.axes[key][leaf]
            if held and held != best[: len(held)]:
                _report(state, origin, op, (key, leaf), longest)
            elif (
                len(held) < len(best)
                and not state.fixed[key][leaf]
                and _free(state, mesh, key, leaf, best, factor.size)
            ):
                state.axes[key][leaf] = best
                origin.setdefault((key, leaf), origin[longest])
                changed = True
    return changed


def _places(op: Op) -> list[list[tuple[Key, int]]]:
    """Per factor of an operator, the base leaves that carry it."""
    places: list[list[tuple[Key, int]]] = [[] for _ in op.factors]
    for item, carried in zip(op.items, op.kind.carried, strict=True):
        for place, factor in zip(item.value.form.places, carried, strict=True):
            if factor is not None and place is not None:
                places[factor].append((item.value.key, place))
    return places


def _free(state: Spread, mesh: Mesh, key: Key, leaf: int, axes: Axes, size: int) -> bool:
    others = {axis_of(a) for i, held in enumerate(state.axes[key]) if i != leaf for a in held}
    return not others & set(map(axis_of, axes)) and mesh.splits(size, axes)


def _report(
    state: Spread, origin: dict[tuple[Key, int], str], op: Op, one: tuple[Key, int], other: tuple[Key, int]
) -> None:
    labels = sorted({origin.get(one, "?"), origin.get(other, "?")})
    axes = sorted({"x".join(state.axes[key][leaf]) for key, leaf in (one, other)})
    text = f"{op.node.name} ({where(op.node)}) meets {' and '.join(axes)} on one factor; from: {' | '.join(labels)}"
    if text not in state.conflicts:
        state.conflicts.append(text)
