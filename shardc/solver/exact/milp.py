"""Branch and bound by HiGHS: the last resort for a network too wide to eliminate.

The linear program over the local polytope: a variable `p_v[a]` per value and `q_e[a, b]` per finite pair, all at
least zero,

    sum_a p_v[a] = 1,    sum_b q_e[a, b] = p_u[a],    sum_a q_e[a, b] = p_v[b],    p integral.

Two variables of 2 values with a full table make 4 + 4 columns and 2 + 4 rows. Costs must come scaled (HiGHS stops at
absolute gaps of 1e-6), and are best given as reparametrised by the bound, where all are nonnegative and small.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
from scipy.sparse import coo_array  # pyright: ignore[reportMissingTypeStubs]

from shardc.solver.problem import Array, Edge


@dataclass(frozen=True)
class Outcome:
    """`choice` is None when none was found; `lower` is what HiGHS proved: inf if no finite choice exists."""

    choice: list[int] | None
    lower: float
    finished: bool


@dataclass(frozen=True)
class LinearLimit:
    """What the terms of a choice add up to at most `bound`. Every pair has a table in the network."""

    unary: Sequence[tuple[int, Array]]
    edges: Sequence[tuple[Edge, Array]]
    bound: float


def solve_milp(
    unary: Sequence[Array], edges: dict[Edge, Array], time_limit: float | None, limits: Sequence[LinearLimit] = ()
) -> Outcome:
    """Minimise over the network; costs in units in which 1e-6 does not matter."""
    starts = np.concatenate([[0], np.cumsum([len(cost) for cost in unary])])
    integral = int(starts[-1])
    costs, matrix, right = _program(unary, edges, starts)
    options: dict[str, float] = {"mip_rel_gap": 0.0}
    if time_limit is not None:
        options["time_limit"] = max(time_limit, 0.01)
    result = milp(
        costs,
        constraints=[
            LinearConstraint(matrix, right, right),  # pyright: ignore[reportArgumentType]
            *(LinearConstraint(_row(limit, edges, starts, len(costs)), -np.inf, 1.0) for limit in limits),
        ],
        integrality=(np.arange(len(costs)) < integral).astype(np.int8),
        bounds=Bounds(0.0, 1.0),
        options=options,
    )
    if result.status == 2:
        return Outcome(None, math.inf, finished=True)
    bound = result.mip_dual_bound
    lower = -math.inf if bound is None else float(bound)
    if result.x is None:
        return Outcome(None, lower, finished=False)
    choice = [int(np.argmax(result.x[a:b])) for a, b in itertools.pairwise(starts)]
    return Outcome(choice, lower, finished=result.status == 0)


def _row(limit: LinearLimit, edges: dict[Edge, Array], starts: "np.ndarray", columns: int) -> Array:
    """The coefficients of a limit, in units of its bound."""
    row = np.zeros(columns)
    for v, table in limit.unary:
        row[starts[v] : starts[v] + len(table)] += table
    first, places = int(starts[-1]), dict[Edge, int]()
    for edge, table in sorted(edges.items()):
        places[edge], first = first, first + int(np.isfinite(table).sum())
    for edge, table in limit.edges:
        held = table[np.isfinite(edges[edge])]
        row[places[edge] : places[edge] + len(held)] += held
    return row / limit.bound


def _program(unary: Sequence[Array], edges: dict[Edge, Array], starts: "np.ndarray") -> tuple[Array, coo_array, Array]:
    """Objective, equality matrix and its right side."""
    costs = [np.where(np.isfinite(cost), cost, 0.0) for cost in unary]
    rows = [np.repeat(np.arange(len(unary)), [len(cost) for cost in unary])]
    columns, signs = [np.arange(int(starts[-1]))], [np.ones(int(starts[-1]))]
    row, column = len(unary), int(starts[-1])
    for (u, v), table in sorted(edges.items()):
        a, b = np.nonzero(np.isfinite(table))
        pairs = np.arange(column, column + len(a))
        n, m = table.shape
        rows += [row + a, row + n + b, row + np.arange(n + m)]
        columns += [pairs, pairs, np.concatenate([starts[u] + np.arange(n), starts[v] + np.arange(m)])]
        signs += [np.ones(len(a)), np.ones(len(a)), -np.ones(n + m)]
        costs.append(table[a, b])
        row, column = row + n + m, column + len(a)
    entries = (np.concatenate(signs), (np.concatenate(rows), np.concatenate(columns)))
    right = np.concatenate([np.ones(len(unary)), np.zeros(row - len(unary))])
    return np.concatenate(costs), coo_array(entries, shape=(row, column)), right
