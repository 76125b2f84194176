"""Which axes are offered to fold the sequences of causal attention.

solved as if balanced    attention: cp splits r and s (ring)    ->    cp is offered: f32[1, 8, 65536@cp~folded, 64]
solved as if balanced    attention: cp splits h                 ->    nothing is offered

A problem with folded layouts has many plans that cost nearly the same, and takes long to solve. So the one without
them is solved first, where every causal attention counts as if its sequence was folded. No plan with folded layouts is
cheaper than that, since it is the same plan with conversions of order left out. Where the cheapest plan splits no
sequence of causal attention, it is the cheapest with folded layouts, too: it costs the same where nothing counts as
folded, and its proof holds there. Else the axes that split one are offered, and the problem is solved again.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shardc.ir.layout import is_folded
from shardc.ir.mesh import Mesh
from shardc.planning.cost_network import Assignment
from shardc.rules.factors.factored import Factored
from shardc.rules.factors.factoring import factor
from shardc.rules.factors.foldable import is_worth_folding, read_causally
from shardc.rules.factors.strategy import Strategy
from shardc.runtime.mesh.orders import axis_of
from shardc.solver.problem import TOLERANCE, Problem, evaluate, magnitude
from shardc.solver.solve import Solution


def may_gain(factored: Factored, mesh: Mesh) -> bool:
    """Whether an axis could fold a sequence of causal attention in a way that its kernels gain from."""
    sizes = {factored.atoms.size(ref) for op in factored.ops for ref in read_causally(op, factored.atoms)}
    return any(is_worth_folding(size, ranks) for size in sizes for _, ranks in mesh.axes)


def along_sequences(factored: Factored, mesh: Mesh, assignment: Assignment) -> tuple[str, ...]:
    """The axes that alone split a sequence of causal attention, and may fold it."""
    axes: set[str] = set()
    for op in factored.ops:
        band = op.rule.band
        if band is not None and band.causal:
            for one, split in zip(op.factors, assignment.strategies[op.node].split, strict=True):
                in_band = one.name in (band.rows, band.columns) and len(split) == 1
                if in_band and is_worth_folding(one.size, mesh.ranks[split[0]]):
                    axes.add(axis_of(split[0]))
    return tuple(axis for axis in mesh.names if axis in axes)


def folding(assignment: Assignment) -> tuple[str, ...]:
    """The axes that fold something."""
    strategies: list[Strategy] = list(assignment.strategies.values())
    axes = {axis_of(axes[-1]) for strategy in strategies for axes in strategy.split if is_folded(axes)}
    return tuple(sorted(axes))


def offered(factored: Factored, mesh: Mesh, axes: tuple[str, ...]) -> Factored:
    """The same program, in which the axes may fold the sequences of causal attention."""
    return factor(factored.program, {axis: mesh.sizes[axis] for axis in axes}) if axes else factored


def carried(solution: Solution, balanced: Problem, problem: Problem) -> Solution | None:
    """The solution of the balanced problem as one of `problem`, if its choice costs the same there and no other choice
    costs less than it does when balanced; else None."""
    if any((one < other).any() for one, other in zip(problem.unary, balanced.unary, strict=True) if one is not other):
        return None
    tables = balanced.edges
    if any(table is not tables[at] and not np.array_equal(table, tables[at]) for at, table in problem.edges.items()):
        return None
    cost = evaluate(problem, solution.choice)
    if cost - solution.cost > TOLERANCE * magnitude(problem, solution.choice):
        return None
    return replace(solution, cost=cost)
