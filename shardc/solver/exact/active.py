"""An active set: the network over a few values of every variable.

values 1, 2 and 3 of one variable are left open     ->     they stay, and 2 is number 1 of them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardc.solver.pool import Mask, Restriction
from shardc.solver.problem import Problem


@dataclass(frozen=True)
class ActiveSet:
    """Per variable which values stay."""

    masks: list[Mask]

    def problem(self, problem: Problem) -> Problem:
        """The network over the values that stay."""
        part = Restriction(self.masks)
        edges = {(u, v): part(table, u, v) for (u, v), table in problem.edges.items()}
        return Problem([part.of_cost(cost, v) for v, cost in enumerate(problem.unary)], edges, problem.names)

    def outside(self, choice: Sequence[int]) -> list[int]:
        """A choice of the smaller network as one of the whole."""
        return [int(np.flatnonzero(mask)[x]) for mask, x in zip(self.masks, choice, strict=True)]
