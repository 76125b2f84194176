"""A better choice from a bound: elimination over the values of small reduced cost only.

Where ties keep the sweeps from a good choice, it lies among these values. The threshold is the largest of gap / 2,
gap / 4, ... at which so few values stay that variable elimination can take them.

    gap 8, reduced costs [0, 1, 5] and [0, 0, 3]     below 4: values {0, 1} and {0, 1, 2}, eliminated exactly
"""

from collections.abc import Sequence

import numpy as np

from shardc.solver import tuning
from shardc.solver.bounds.bound import Bound
from shardc.solver.exact.eliminate import eliminate, find_order, forbidding, quick_order, surviving
from shardc.solver.pool import Restriction


def restricted_search(
    bound: Bound, gap: float, incumbent: Sequence[int], counts: Sequence[int] | None = None, roughly: bool = False
) -> list[int] | None:
    """The best choice over the values whose reduced cost lies below the largest part of the gap, by halves, that
    elimination can take, and those of the incumbent. None if even those are too many. With `counts`, of every
    variable's so many first values. `roughly`: by the order of elimination that is found sooner."""
    reduced, edges = bound.reduced_costs(), bound.tables_by_edge()
    forbidden = forbidding(edges)
    for cost, count in zip(reduced, counts or map(len, reduced), strict=True):
        cost[count:] = np.inf
    for halvings in range(1, tuning.RESTRICTED_HALVINGS):
        keep = surviving(reduced, forbidden, gap * 0.5**halvings, incumbent)
        if sum(map(np.count_nonzero, keep)) > tuning.RESTRICTED_VALUES * len(keep):
            continue
        part = [cost[mask] for cost, mask in zip(bound.unary, keep, strict=True)]
        order = (quick_order if roughly else find_order)([len(cost) for cost in part], list(edges))
        if order.narrow:
            cut = Restriction(keep)
            tables = {(u, v): cut(table, u, v) for (u, v), table in edges.items()}
            _, choice = eliminate(part, tables, order)
            return [int(np.flatnonzero(mask)[x]) for mask, x in zip(keep, choice, strict=True)]
    return None
