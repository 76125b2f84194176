"""Close one network: sweep, delete values, add triplets, search exactly, and at last branch.

The search keeps an incumbent (`choice`, which costs `upper`) and a bound `lower`; it ends when they meet.

    sweep, prune  ->  narrow? eliminate  ->  stalled? add triplets, restricted search  ->  nothing helps? branch

`solve.py` tells the whole; every step has a file of its own.
"""

from __future__ import annotations

import math
import time

import numpy as np

from shardc.errors import InfeasibleError
from shardc.solver import tuning
from shardc.solver.bounds.bound import Bound
from shardc.solver.bounds.extrapolate import Extrapolation
from shardc.solver.bounds.triplets import Groups, frustrated
from shardc.solver.exact.eliminate import eliminate, find_order, forbidding, surviving
from shardc.solver.exact.forest import descend
from shardc.solver.exact.restricted_search import restricted_search
from shardc.solver.problem import TOLERANCE


class Search:
    """The search over the network of a bound, to a gap of `relative_gap` times the cost. `constant` is a part of the
    cost that the network lacks. A `draft` adds no triplets, and branches only where it has no choice yet."""

    def __init__(
        self, bound: Bound, deadline: float, relative_gap: float = TOLERANCE, constant: float = 0.0, draft: bool = False
    ) -> None:
        self.deadline, self.relative_gap, self.constant, self.draft = deadline, relative_gap, constant, draft
        self.bound = bound
        self.values = [np.arange(len(cost)) for cost in bound.unary]  # what the bound's values are in the core
        self.choice: list[int] | None = None
        self.upper = math.inf
        self.lower = bound.lower

    def start(self, choice: list[int]) -> None:
        """Take a choice that is known, and what a descent from it finds."""
        self._offer(choice)
        self._offer(descend(self.bound, choice))

    def close(self) -> list[int]:
        """Narrow the gap between a choice and a bound that are close already; no triplets, no branching."""
        assert self.choice is not None
        self._prune()
        if not (self._eliminated(math.inf) or self._swept(tuning.SEARCH_STALLED)):
            self._eliminated(math.inf)
        return self.choice

    def run(self) -> list[int]:
        """The best choice. Raises InfeasibleError if there is none, TimeoutError if none was found in time."""
        if not (
            self._eliminated(tuning.IMMEDIATE_WORK)
            or self._swept(tuning.SEARCH_STALLED)
            or self._eliminated(math.inf)
            or self._alternated()
        ):
            self._branch()
        if self.choice is None:
            raise TimeoutError("no feasible plan was found within the time limit")
        return self.choice

    def _late(self) -> bool:
        return time.process_time() > self.deadline

    def _closed(self) -> bool:
        return self.upper - self.lower <= self.relative_gap * abs(self.upper + self.constant)

    def _swept(self, stall: float) -> bool:
        """Sweep and prune until closed (True) or stalled: gaining less than `stall` of the gap between two looks."""
        before, tried, extrapolation = -math.inf, math.inf, Extrapolation()
        for turn in range(1, tuning.SEARCH_SWEEPS // Extrapolation.SWEEPS + 1):
            extrapolation.round(self.bound)
            if turn % tuning.LOOK_EVERY:
                continue
            self._offer(descend(self.bound, self.bound.decode()))
            self.lower = self.bound.lower
            gap = self.upper - self.lower
            if self._closed() or (self._late() and self.choice is not None):
                return True
            if gap < tuning.PRUNE_AGAIN * tried:
                tried = gap
                self._prune()
                if self._eliminated(math.inf):
                    return True
            if self._late() or self.lower - before < stall * min(gap, abs(self.lower)):
                return False
            before = self.lower
        return False

    def _alternated(self) -> bool:
        """A better bound leaves less to search, a better incumbent less to bound: in turns, as long as either helps."""
        while True:
            before = self.upper
            if (not self.draft and self._tightened()) or self._searched_restricted():
                return True
            if self.choice is None or not self.upper < before:
                return self._late() and self.choice is not None

    def _tightened(self) -> bool:
        """Add triplets and sweep on, until closed (True) or stalled."""
        for _ in range(tuning.SEARCH_TRIPLET_ROUNDS):
            if self.choice is None or self._late():
                return False
            self._prune()
            before, gap = self.lower, self.upper - self.lower
            groups = [Groups.by(cost) for cost in self.bound.reduced_costs()]
            unary, spare = self.bound.spare()
            known = {triplet.variables for triplet in self.bound.triplets}
            more = [
                t for t in frustrated(unary, spare, groups, tuning.TRIPLET_GAIN * gap, self._late) if t not in known
            ]
            if not (more or known):
                return False
            self.bound = self.bound.with_triplets(more, groups, self.upper)
            if self._swept(tuning.SEARCH_STALLED_TRIPLETS) or self._eliminated(math.inf):
                return True
            if self.lower - before < tuning.SEARCH_TRIPLETS_HELP * gap:
                return False
        return False

    def _searched_restricted(self) -> bool:
        """Restricted searches, where ties keep the sweeps from a good incumbent. Each better incumbent prunes, so that
        the next one covers more; True when closed."""
        while self.choice is not None and not self._late():
            before = self.upper
            self._search_restricted()
            if not self.upper < before:
                return False
            self._prune()
            if self._closed() or self._eliminated(math.inf):
                return True
            for _ in range(tuning.LOOK_EVERY * Extrapolation.SWEEPS):
                self.bound.sweep()
            self.lower = max(self.lower, self.bound.lower)
        return False

    def _search_restricted(self) -> None:
        """One restricted search, around the incumbent."""
        assert self.choice is not None
        choice = restricted_search(self.bound, self.upper - self.lower, self._incumbent(self.choice))
        if choice is not None:
            self._offer(choice)

    def _offer(self, choice: list[int]) -> None:
        """Take a choice of the bound's network as incumbent if it is better."""
        cost = self.bound.cost(choice)
        if cost < self.upper:
            self.upper = cost
            self.choice = [int(values[x]) for values, x in zip(self.values, choice, strict=True)]

    def _incumbent(self, choice: list[int]) -> list[int]:
        return [int(np.searchsorted(values, x)) for values, x in zip(self.values, choice, strict=True)]

    def _prune(self) -> None:
        """Delete every value whose reduced cost exceeds the gap."""
        if self.choice is None:
            return
        gap = self.upper - self.bound.current
        reduced = self.bound.reduced_costs()
        keep = surviving(reduced, forbidding(self.bound.tables_by_edge()), gap, self._incumbent(self.choice))
        self.bound = self.bound.restricted(keep)
        self.values = [values[mask] for values, mask in zip(self.values, keep, strict=True)]

    def _eliminated(self, work: float) -> bool:
        """Eliminate all variables, if that takes no more than this work."""
        edges = self.bound.tables_by_edge()
        order = find_order([len(cost) for cost in self.bound.unary], list(edges))
        if not order.narrow or order.total > work:
            return False
        optimum, choice = eliminate(self.bound.unary, edges, order)
        if math.isinf(optimum):
            raise InfeasibleError("the constraints leave no feasible plan")
        self._offer(choice)
        self.lower = self.upper
        return True

    def _branch(self) -> None:
        """Branch over the rest, in rewritten costs; those above the gap cannot be part of a better choice."""
        from shardc.solver.exact.milp import solve_milp

        pairs = sum(t.size for t in self.bound.tables_by_edge().values())
        if self.choice is not None and (self.draft or self._late() or pairs > tuning.BRANCHED_PAIRS):
            return
        constant, unary, edges = self.bound.rewritten_network()
        room = self.upper - constant
        top = max((float(t[np.isfinite(t)].max()) for t in [*unary, *edges.values()]), default=0.0)
        scale = tuning.MILP_UNITS / max(min(room, top), 1e-300)
        scaled = {e: np.where(t <= room * (1.0 + TOLERANCE), t * scale, np.inf) for e, t in edges.items()}
        limit = None if math.isinf(self.deadline) else self.deadline - time.process_time()
        outcome = solve_milp([cost * scale for cost in unary], scaled, limit)
        if outcome.choice is not None:
            self._offer(outcome.choice)
        elif outcome.finished and self.choice is None:
            raise InfeasibleError("the constraints leave no feasible plan")
        proved = min(self.upper, constant + outcome.lower / scale)
        self.lower = self.upper if outcome.finished else max(self.lower, proved)
