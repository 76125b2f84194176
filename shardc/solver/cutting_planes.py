"""The Lagrangian dual of a capacity, maximised by cutting planes.

With multipliers `m_t >= 0`, the least of the Lagrangian is a bound for every choice within the capacity:

    dual(m) = min over x of  cost(x) + sum_t m_t * (load_t(x) - capacity)     <=   cost of every x within the capacity

(Everett 1963, "Generalized Lagrange multiplier method"). For one fixed `x` the inner term is linear in `m`. So every
choice found is a plane above the dual, and a linear program over these planes tells which multipliers to ask next
(Kelley 1960, "The cutting-plane method").

The same program weighs the points: a mixture of them costs as much as the planes promise. Positions where some point
over the capacity has its peak get a multiplier, and those where such a mixture has its own, as long as that is over the
capacity. Two points may have their peaks where a mixture has none, and a mixture where they have none.

    capacity 3    points (cost 1, load 5), (cost 9, load 1)    planes z <= 1 + 2m, z <= 9 - 2m    next: m = 2, z = 5
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shardc.solver.pareto import Points
from shardc.solver.problem import TOLERANCE, Array
from shardc.solver.proof.certificate import Certificate


@dataclass(frozen=True)
class DualPoint:
    """Multipliers, and `least`: what every choice costs at least in their Lagrangian.

    `certificate` proves that, as far as there is one. For a `draft`, `least` is only the cost of the best choice found.
    A `fine` one proves what a solve with these multipliers can; others are rough, or known from elsewhere."""

    multipliers: Mapping[int, float]
    least: float
    certificate: Certificate
    draft: bool = False
    fine: bool = False

    def bound(self, capacity: float) -> float:
        """What every choice within the capacity costs at least."""
        return self.least - capacity * math.fsum(self.multipliers.values())


class CuttingPlanes:
    """What is known of the dual: proved values at some multipliers, and planes above it."""

    def __init__(self, points: Points) -> None:
        self._points = points
        self.known: list[DualPoint] = []

    def best(self, capacity: float, drafts: bool = False) -> DualPoint:
        """The one that proves most for a capacity; with `drafts`, or seems to."""
        return max((p for p in self.known if drafts or not p.draft), key=lambda point: point.bound(capacity))

    def proved(self, multipliers: Mapping[int, float]) -> bool:
        """Whether all is proved that a solve with these multipliers can prove."""
        return any(point.fine and point.multipliers == multipliers for point in self.known)

    def next(self, capacity: float, ceiling: float) -> tuple[Mapping[int, float], float]:
        """The multipliers at which the planes leave most room, and the value there. The sum of each multiplier times
        the capacity is at most `ceiling` times the cost of the first point."""
        points = self._points.all
        places = self._points.peaks(above=capacity)
        loads = np.array([point.load for point in points]) / capacity
        unit = max(abs(points[0].cost), 1e-12)  # multipliers in units of cost per capacity
        costs = np.array([point.cost for point in points]) / unit
        while True:
            answer = _roomiest(costs, loads[:, places], ceiling)
            if answer is None:  # HiGHS gave up: what is known best must do
                best = self.best(capacity, drafts=True)
                return dict(best.multipliers), best.bound(capacity)
            value, found, weights = answer
            mixture = weights @ loads
            worst = int(mixture.argmax())
            if mixture[worst] <= 1.0 + TOLERANCE or worst in places:
                break
            places.append(worst)
        multipliers = {t: float(m) * unit / capacity for t, m in zip(places, found, strict=True) if m > 0.0}
        return dict(sorted(multipliers.items())), value * unit

    def halfway(self, multipliers: Mapping[int, float], capacity: float) -> dict[int, float]:
        """Half way to the multipliers that seem to prove most. From there, steps do not swing from position to position
        (Ben-Ameur and Neto 2007, "Acceleration of cutting-plane and column generation algorithms")."""
        best = self.best(capacity, drafts=True).multipliers
        return {t: 0.5 * (multipliers.get(t, 0.0) + best.get(t, 0.0)) for t in sorted({*multipliers, *best})}


def _roomiest(costs: Array, loads: Array, ceiling: float) -> tuple[float, Array, Array] | None:
    """The largest `z` with `z <= costs_k + sum_t m_t (loads_kt - 1)` for every point `k` and multipliers of at most
    `ceiling`; these multipliers; and weights of the points, of sum 1, whose mixture costs `z`. None if HiGHS gave up.
    """
    from scipy.optimize import linprog  # takes a second to import, and few problems have a capacity

    rows = np.hstack([np.ones((len(costs), 1)), 1.0 - loads])
    ranges = [(None, None), *[(0.0, ceiling)] * loads.shape[1]]
    answer = linprog([-1.0, *[0.0] * loads.shape[1]], A_ub=rows, b_ub=costs, bounds=ranges)
    if answer.x is None:
        return None
    return float(answer.x[0]), answer.x[1:], -answer.ineqlin.marginals
