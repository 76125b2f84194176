"""Ways: every mesh with every number of micro-batches, planned for one batch, the most promising first.

mesh       micro-batches   bound a row   what is done with it
dp=8       1               1.2 us        planned without a bound on memory; it does not fit
dp=8       1               1.3 us        planned within the bound
dp=8       2               1.3 us        only if the bound on memory still costs time
dp=2,tp=4  1               1.9 us        never planned: the best takes 1.8 us a row
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from shardc.decided import decided_alone
from shardc.errors import ShardcError
from shardc.ir.mesh import Mesh
from shardc.ir.printing import in_bytes, in_seconds
from shardc.passes.assign import TooSlowError, first_network
from shardc.passes.pipeline import part, run
from shardc.planning.compilation import Compilation
from shardc.planning.gc_pause import gc_paused
from shardc.planning.out_of_memory import OutOfMemoryError
from shardc.planning.time_axis import counts_worth_trying
from shardc.search.ranking import TOO_LARGE, Candidate
from shardc.solver.proof.certificate import Certificate, check

LITTLE = 0.01
"""What memory costs of a step, as a part of it, for which more micro-batches are not worth trying."""
SHRINKS = 0.05
"""By this part the smallest peak has to be less in four times as many micro-batches, or still more are not tried."""


@dataclass(order=True)
class _Way:
    """A way that is still to be planned; no plan of it takes less than `bound` seconds a row. `within`: the plan
    without a bound on memory is known not to fit."""

    bound: float
    number: int
    mesh: Mesh = field(compare=False)
    count: int = field(compare=False)
    within: bool = field(compare=False, default=False)


class Ways:
    """The ways of one captured batch. `best` are the seconds a row of the best plan so far, as the solver prices it:
    a way whose bound lies above is not planned."""

    def __init__(self, captured: Mapping[str, Compilation], rows: int, counts: Sequence[int], optimizer: str) -> None:
        self._captured, self._rows, self._counts, self._optimizer = captured, rows, counts, optimizer
        self._size = rows or 1
        self._divided: dict[int, dict[str, Compilation]] = {}
        self._open: list[_Way] = []
        self._fastest: dict[Mesh, float] = {}
        self._least: dict[Mesh, list[float]] = {}
        self._number = 0
        self.found: list[Candidate] = []
        self.undivided = ""  # why the batch cannot be divided, where it had to be
        self.best = math.inf

    def tried(self, meshes: Sequence[Mesh], best: float = math.inf) -> list[Candidate]:
        """A candidate for every way that was looked at."""
        self.best = best
        for mesh in meshes:
            self._push(0.0, mesh, self._counts[0])
        while self._open:
            way = heapq.heappop(self._open)
            if way.bound >= self.best:
                self._leave(way, way.bound, 0.0)
                continue
            with gc_paused():
                self._try(way)
        return self.found

    def _push(self, bound: float, mesh: Mesh, count: int, within: bool = False) -> None:
        heapq.heappush(self._open, _Way(bound, self._number, mesh, count, within))
        self._number += 1

    def _try(self, way: _Way) -> None:
        start, bound = time.process_time(), way.bound
        try:
            c, snapshots = self._posed(way)
            network = first_network(c)
            if network.offers is None:
                bound = max(bound, c.program.turns * check(network.problem(), Certificate({})) / self._size)
            if bound >= self.best:
                self._leave(way, bound, time.process_time() - start)
                return
            too_slow = math.inf if way.within else 0.0
            plan = decided_alone(replace(c, network=network, too_slow=too_slow), snapshots).plan
        except TooSlowError as error:
            turns = way.count if way.count > 1 else 1
            self._push(max(bound, turns * error.bound / self._size), way.mesh, way.count, within=True)
            return
        except OutOfMemoryError as error:
            spent = time.process_time() - start
            self._without(way, 0.0, spent, f"{TOO_LARGE}: {in_bytes(error.least)} at least", error.least)
            least = self._least.setdefault(way.mesh, [])
            least.append(error.least)
            if len(least) < 3 or least[-1] <= (1.0 - SHRINKS) * least[-3]:  # sums of gradients come with the second
                self._more(way, way.bound)
            return
        except ShardcError as error:
            if way.count == self._counts[0]:
                self._without(way, 0.0, time.process_time() - start, str(error).splitlines()[0])
            else:  # what couples samples does so in any number of micro-batches
                self.undivided = str(error).splitlines()[0]
            return
        summary, turns = plan.summary, plan.turns
        one = Candidate(
            way.mesh, way.count, self._rows, self._optimizer, turns * plan.cost, turns * plan.lower_bound,
            plan.memory.peak, time.process_time() - start, _too_much(plan.memory.peak, c), summary, plan.near,
        )  # fmt: skip
        self.found.append(one)
        self.best = min(self.best, one.cost / self._size)
        costs_time = one.cost / self._size > (1.0 + LITTLE) * bound
        if summary.memory_binds and costs_time and one.seconds < self._fastest.get(way.mesh, math.inf):
            self._more(way, bound)
        self._fastest[way.mesh] = min(one.seconds, self._fastest.get(way.mesh, math.inf))

    def _posed(self, way: _Way) -> tuple[Compilation, dict[str, Compilation]]:
        """The problem of a way, and what the passes before left."""
        if way.count not in self._divided:
            snapshots = dict(self._captured)
            c = snapshots["factor"]
            asked = replace(c.options, microbatches=way.count)
            run(part("microbatch", "microbatch"), replace(c, options=asked, mesh=way.mesh), snapshots)
            self._divided[way.count] = snapshots
        snapshots = dict(self._divided[way.count])
        c = snapshots["microbatch"]
        if c.prologue is not None and c.mesh != way.mesh:  # it was compiled for a mesh
            before = replace(snapshots["factor"], options=c.options, mesh=way.mesh)
            c = run(part("microbatch", "microbatch"), before, snapshots)
        return run(part("retile", "propagate"), replace(c, mesh=way.mesh), snapshots), snapshots

    def _more(self, way: _Way, bound: float) -> None:
        """Try the next number of micro-batches."""
        place = self._counts.index(way.count) + 1
        if place < len(self._counts):
            self._push(bound, way.mesh, self._counts[place])

    def _leave(self, way: _Way, bound: float, spent: float) -> None:
        within = " within memory" if way.within else ""
        self._without(
            way, bound, spent, f"not solved{within}: no plan takes less than {in_seconds(bound * self._size)}"
        )

    def _without(self, way: _Way, bound: float, spent: float, remark: str, least: float = 0.0) -> None:
        asked = way.mesh, way.count, self._rows, self._optimizer
        self.found.append(Candidate(*asked, math.inf, bound * self._size, least, spent, remark))


def _too_much(held: float, c: Compilation) -> str:
    memory = c.options.device.memory
    return f"more than the {in_bytes(memory)} of a device" if held > memory else ""


def counts_to_try(c: Compilation, asked: int | str | None) -> list[int]:
    """The numbers of micro-batches to try, the smallest first: the one that was asked for, or what a bound on memory
    may need."""
    if isinstance(asked, int):
        return [asked]
    return [1] if c.options.budget is None else counts_worth_trying(c.program)
