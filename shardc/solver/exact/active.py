"""An active set: the network over a few values of every variable, those of small reduced cost.

Of hundreds of values, cheap choices are made of those with the smallest reduced costs, as a few sweeps tell them.
Among these a choice is found in a fraction of the time. What it is worth among all values, a proof over all tells.

    reduced costs [3, 0, 7, 1], two kept, choice 2     ->     values 1, 2 and 3 stay; the choice is number 1 of them
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from shardc.solver import tuning
from shardc.solver.pool import Mask, Restriction
from shardc.solver.problem import Array, Edge, Problem
from shardc.solver.proof.certificate import Certificate


@dataclass(frozen=True)
class ActiveSet:
    """Per variable which values stay."""

    masks: list[Mask]

    @staticmethod
    def of(reduced: Sequence[Array], choice: Sequence[int]) -> ActiveSet:
        """The values of the smallest reduced costs, and those of a choice."""
        masks: list[Mask] = []
        for cost, x in zip(reduced, choice, strict=True):
            mask = np.zeros(len(cost), dtype=np.bool_)
            mask[np.argsort(cost, kind="stable")[: tuning.ACTIVE_VALUES]] = True
            mask[x] = True
            masks.append(mask)
        return ActiveSet(masks)

    def problem(self, problem: Problem) -> Problem:
        """The network over the values that stay."""
        part = Restriction(self.masks)
        edges = {(u, v): part(table, u, v) for (u, v), table in problem.edges.items()}
        return Problem([part.of_cost(cost, v) for v, cost in enumerate(problem.unary)], edges, problem.names)

    def messages(self, certificate: Certificate, edges: Container[Edge]) -> Certificate:
        """The messages of a certificate on some edges, over the values that stay."""
        known = ((edge, pair) for edge, pair in certificate.messages.items() if edge in edges)
        return Certificate({(u, v): (a[self.masks[u]], b[self.masks[v]]) for (u, v), (a, b) in known})

    def inside(self, choice: Sequence[int]) -> list[int]:
        """A choice of values that stay as one of the smaller network."""
        return [int(np.count_nonzero(mask[:x])) for mask, x in zip(self.masks, choice, strict=True)]

    def outside(self, choice: Sequence[int]) -> list[int]:
        """A choice of the smaller network as one of the whole."""
        return [int(np.flatnonzero(mask)[x]) for mask, x in zip(self.masks, choice, strict=True)]
