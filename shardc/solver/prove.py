"""Find a certificate: message sweeps on the unreduced problem, stopped when they prove the known cost.

An entry above `2 * (cost - sum of all minima + largest minimum)` cannot occur in a solution as cheap as the known
one, so for the sweeps every entry is cut off there. That removes the inf's, and a bound for the smaller costs is
one for the true ones.
"""

import math
import time
from collections.abc import Mapping

import numpy as np

from shardc.solver.bound import Bound
from shardc.solver.certificate import Certificate
from shardc.solver.problem import Array, Edge, Problem

MAX_SWEEPS = 200
_CHECK_EVERY = 5


def prove(
    problem: Problem, cost: float, tolerance: float, deadline: float,
    start: Mapping[Edge, tuple[Array, Array]] | None = None,
) -> Certificate:  # fmt: skip
    """Messages whose bound comes within `tolerance` of `cost`, or as close as the sweeps get from those of `start`."""
    bound = _clipped(problem, cost)
    if start is not None:
        bound.begin(start)
    before = -math.inf
    for sweep in range(1, MAX_SWEEPS + 1):
        lower = bound.sweep()
        gap = cost - lower
        if gap <= tolerance or time.process_time() > deadline:
            break
        if sweep % _CHECK_EVERY == 0:
            if lower - before < 1e-3 * gap:
                break
            before = lower
    return Certificate(bound.messages())


def _clipped(problem: Problem, cost: float) -> Bound:
    tables = [*problem.unary, *problem.edges.values()]
    minima = [float(table.min()) for table in tables]
    ceiling = 2.0 * (cost - math.fsum(minima) + max((abs(m) for m in minima), default=0.0))
    clipped: dict[int, Array] = {id(table): np.minimum(table, ceiling) for table in tables}
    return Bound(
        [clipped[id(c)] for c in problem.unary], {edge: clipped[id(table)] for edge, table in problem.edges.items()}
    )
