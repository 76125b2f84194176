"""Find a certificate: messages and triplets over the unreduced problem whose bound meets a known cost.

1. Sweep over all values (`bounds/bound.py`).
2. Where that stalls, *gather*: the values of a variable that are too dear to matter become one, which costs as little
   as any of them. Messages for that one value are messages for all of them, so nothing is lost on the way back.
3. Add triplets (`bounds/triplets.py`), and so on, until the bound meets the cost.

*Clipping.* An entry above `2 * (cost - sum of all minima + largest minimum)` cannot occur in a choice as cheap as the
known one. So every entry is cut off there for the sweeps. That removes the inf's, and a bound for the smaller costs is
one for the true ones.

    known cost 10, minima sum to 4, the largest is 3:     every entry above 2 * (10 - 4 + 3) = 18 counts as 18
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardc.solver import tuning
from shardc.solver.bounds.bound import Bound, Place
from shardc.solver.bounds.distinct import TableCache
from shardc.solver.bounds.extrapolate import Extrapolation
from shardc.solver.bounds.triplets import Groups, frustrated
from shardc.solver.exact.forest import descend
from shardc.solver.exact.restricted_search import restricted_search
from shardc.solver.problem import TOLERANCE, Array, Edge, Problem, evaluate, magnitude
from shardc.solver.proof.certificate import Certificate, Lender


@dataclass(frozen=True)
class Target:
    """What a proof aims at: the cost of the best choice, and how far below it the bound may stay."""

    cost: float
    tolerance: float


def prove(
    problem: Problem, target: Target, deadline: float, start: Certificate | None = None, sweeps: int | None = None,
    roughly: bool = False, tables: TableCache | None = None,
) -> Certificate:  # fmt: skip
    """A certificate whose bound comes as close to the target as asked, or as it gets, from messages of `start` on.

    With `sweeps`, it sweeps about so many times, and on only while it is about to close. For `roughly` and `tables` see
    `clipped`."""
    bound = clipped(problem, target.cost, roughly, tables)
    prover = Prover(problem, bound if start is None else bound.starting(start), target, deadline)
    if sweeps is None:
        prover.run()
    elif target.cost - prover.lower > target.tolerance:
        prover.sweep(sweeps)
    return prover.certificate()


class Prover:
    """Raises a bound to the cost of the best choice. Without a `target` it looks for that choice too, and is content
    with one whose cost is at most `relative_gap` times itself above the bound."""

    def __init__(
        self, problem: Problem, bound: Bound, target: Target | None, deadline: float, relative_gap: float = TOLERANCE
    ) -> None:
        self.problem, self.whole, self.bound = problem, bound, bound
        self.deadline, self.relative_gap = deadline, relative_gap
        self.cost, self.tolerance = (target.cost, target.tolerance) if target else (math.inf, 0.0)
        self.searching = target is None
        self.choice: list[int] | None = None
        self.searched_gap = 0.0  # the gap at the last restricted search; before any, when a choice was first known
        self.lower = bound.lower
        self.values = [np.arange(len(cost)) for cost in bound.unary]  # of the problem, per value that is told apart
        self.places = [np.arange(len(cost)) for cost in bound.unary]  # in the bound, per value of the problem
        self.messages: dict[Edge, tuple[Array, Array]] = {}  # that the costs of the bound contain

    def run(self) -> bool:
        """Sweep; gather values, add triplets, sweep on; until closed (True), or that does not help any more."""
        closed = self.cost - self.lower <= self.tolerance or self.sweep()
        for _ in range(tuning.PROOF_TRIPLET_ROUNDS):
            gap = self.cost - self.lower
            if closed or self._late() or not math.isfinite(gap):
                break
            reduced = self.bound.reduced_costs() if self.bound.triplets else self._gather(gap)
            groups = [Groups.by(cost) for cost in reduced]
            unary, spare = self.bound.spare()
            known = {triplet.variables for triplet in self.bound.triplets}
            more = [
                t for t in frustrated(unary, spare, groups, tuning.TRIPLET_GAIN * gap, self._late) if t not in known
            ]
            if not (more or known):
                break
            self.bound = self.bound.with_triplets(more, groups, math.inf)
            closed = self.sweep()
            if self.cost - self.lower > (1.0 - tuning.PROOF_TRIPLETS_HELP) * gap:
                break
        return closed

    def know(self, choice: list[int], target: Target) -> None:
        """Take the best choice, which was found elsewhere."""
        self.choice, self.cost, self.tolerance, self.searching = choice, target.cost, target.tolerance, False

    @property
    def best_choice(self) -> list[int]:
        """The best choice, where one is known."""
        assert self.choice is not None
        return self.choice

    def certificate(self) -> Certificate:
        messages = dict(self.messages)
        _add(messages, self.bound.messages(), self.places)
        lenders: list[Lender] = []
        known: dict[int, NDArray[np.intp]] = {}
        for t in self.bound.triplets:
            a, b, c = (
                known.setdefault(id(group), group.index[self.places[v]])
                for group, v in zip(t.groups, t.variables, strict=True)
            )
            lenders.append(Lender(t.variables, (a, b, c), (t.loans[0], t.loans[1], t.loans[2])))
        return Certificate(messages, tuple(lenders))

    def reduced_costs(self) -> list[Array]:
        """A reduced cost per value of the problem, by the messages as they are."""
        return [cost[place] for cost, place in zip(self.bound.reduced_costs(), self.places, strict=True)]

    def _late(self) -> bool:
        return time.process_time() > self.deadline

    def _gather(self, gap: float) -> list[Array]:
        """Gather the values that cannot be part of a choice as cheap as `cost`, if they are most. Returns the reduced
        costs of what the bound then has."""
        reduced = self.bound.reduced_costs()
        keep = [cost <= tuning.GATHER_ABOVE * gap for cost in reduced]
        for mask, values in zip(keep, self.values, strict=True):
            mask[len(values) :] = False
        left = [np.count_nonzero(mask) + 1 for mask in keep]
        if sum(left[u] * left[v] for u, v in self.bound.ends) > tuning.GATHER_SHRINK * self._entries():
            return reduced
        self.bound, places, messages = self.bound.gathered(keep)
        _add(self.messages, messages, self.places)
        self.places = [place[old] for place, old in zip(places, self.places, strict=True)]
        self.values = [values[mask[: len(values)]] for values, mask in zip(self.values, keep, strict=True)]
        gathered = [np.full(len(cost), np.inf) for cost in self.bound.unary]
        for cost, old, place in zip(gathered, reduced, places, strict=True):
            np.minimum.at(cost, place, old)
        return gathered

    def sweep(self, most: int | None = None, searching: bool | None = None) -> bool:
        """Sweep until closed (True), or stalled; after `most` sweeps only while it is about to close. `searching` says
        whether to look for a choice, if that is not as it was at first."""
        searching = self.searching if searching is None else searching
        most = tuning.PROOF_SWEEPS if most is None else most
        before, gathered, extrapolation = -math.inf, math.inf, Extrapolation()
        for turn in range(1, tuning.PROOF_SWEEPS // Extrapolation.SWEEPS + 1):
            last = self.lower
            self.lower = extrapolation.round(self.bound)
            look = turn % tuning.LOOK_EVERY == 0
            if look and searching:
                self.offer()
            gap = self.cost - self.lower
            if gap <= (tuning.AIM_EXACT if self.relative_gap <= TOLERANCE else tuning.AIM_ROUGH) * self.tolerance:
                return True
            if self._late() or (turn * Extrapolation.SWEEPS >= most and gap > tuning.CLOSING * (self.cost - last)):
                return False
            if look:
                stalled = (
                    tuning.PROOF_STALLED if self.bound.triplets or not searching else tuning.PROOF_STALLED_SEARCHING
                )
                if self.lower - before < stalled * min(gap, abs(self.lower)):
                    return False
                before = self.lower
                if (
                    not self.bound.triplets
                    and gap < tuning.GATHER_AGAIN * min(gathered, tuning.GATHER_GAP * abs(self.cost))
                    and self._wide()
                ):
                    self._gather(gap)
                    gathered = gap
        return False

    def _wide(self) -> bool:
        """Whether sweeps spend their time on the entries of tables, of which fewer would do."""
        return self._entries() > tuning.GATHER_TABLE * len(self.bound.ends)

    def _entries(self) -> int:
        """Entries of tables that a sweep reads."""
        return sum(table.small.size for table in self.bound.tables)

    def offer(self) -> None:
        """Look for a better choice: decode the messages, descend from there, and, each time that the gap has shrunk,
        search exactly among the values of small reduced cost."""
        counts = [len(values) for values in self.values]
        choice = self.bound.decode(counts)
        self.take(descend(self.whole, [int(values[x]) for values, x in zip(self.values, choice, strict=True)]))
        gap = self.cost - self.lower
        self.searched_gap = self.searched_gap or gap
        if self.choice is not None and gap <= tuning.RESTRICTED_SEARCH_AGAIN * self.searched_gap:
            self.search()

    def search(self, roughly: bool = False) -> None:
        """Search exactly among the values of small reduced cost, and those of the best choice. Where messages have
        converged, but many values tie, that finds what decoding them does not."""
        counts = [len(values) for values in self.values]
        incumbent = [int(place[x]) for place, x in zip(self.places, self.best_choice, strict=True)]
        self.searched_gap = self.cost - self.lower
        if any(x >= count for x, count in zip(incumbent, counts, strict=True)):
            return
        better = restricted_search(self.bound, self.searched_gap, incumbent, counts, roughly)
        if better is not None:
            self.take([int(values[x]) for values, x in zip(self.values, better, strict=True)])

    def take(self, choice: list[int]) -> None:
        """Take a choice if it is better than the one known."""
        cost = evaluate(self.problem, choice)
        if cost < self.cost:
            self.cost, self.choice = cost, choice
            self.tolerance = max(TOLERANCE * magnitude(self.problem, choice), self.relative_gap * abs(cost))


def _add(
    total: dict[Edge, tuple[Array, Array]], more: Mapping[Edge, tuple[Array, Array]], places: Sequence[Place]
) -> None:
    """Add messages over the values of a bound to messages over those of the problem."""
    for (u, v), (to_u, to_v) in more.items():
        to_u, to_v = to_u[places[u]], to_v[places[v]]
        if (u, v) in total:
            to_u, to_v = to_u + total[u, v][0], to_v + total[u, v][1]
        total[u, v] = to_u, to_v


def clipped(problem: Problem, cost: float, roughly: bool = False, tables: TableCache | None = None) -> Bound:
    """A bound for the problem, whose entries are cut off where no choice as cheap as `cost` can have them. `roughly`:
    in single precision (`Table`). `tables` has the tables that were looked at before."""
    tables = tables or TableCache()
    minima = [tables.least(table) for table in (*problem.unary, *problem.edges.values())]
    ceiling = 2.0 * (cost - math.fsum(minima) + max((abs(m) for m in minima), default=0.0))
    if roughly and math.isfinite(ceiling):
        ceiling = math.ldexp(1.0, math.frexp(ceiling)[1])  # a power of two: seldom another when costs change a little
    edges = {edge: tables.under(ceiling, table, roughly) for edge, table in problem.edges.items()}
    return Bound([np.minimum(cost, ceiling) for cost in problem.unary], edges)
