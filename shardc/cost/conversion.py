"""Layout conversions: the possible steps, what each sends and costs, and the cheapest path between any two layouts.

The solver adds up the entries of one table, and lowering walks the paths of the same table. So the price of a
conversion is the price of exactly the collectives that are emitted.

`shardc/cost/collectives.py` has the cost of each collective. Permute, where every rank sends to one other, is no step
of a conversion: only the bodies of operators use it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shardc.cost.buckets import Sharing
from shardc.cost.hardware import Hardware
from shardc.cost.step_graph import StepGraph, step_graph
from shardc.ir.mesh import Mesh
from shardc.ir.splits import Folds, Splits, Step
from shardc.runtime.collectives.collective import AnyCollective

MANY_LAYOUTS = 300
"""Layouts from which on Dijkstra's way takes less time: a layout has some twelve neighbours."""


def step_seconds(
    collective: AnyCollective, axis: str, operand_bytes: float, mesh: Mesh, device: Hardware, folded: bool = False
) -> float:
    """Seconds of one step over `axis` whose local operand has `operand_bytes` bytes; a local step costs a copy. Where
    it has to do with a dim that is folded, one kernel more brings the two runs together."""
    if mesh.sizes[axis] == 1 and not collective.local:
        return 0.0
    more = device.launch if folded else 0.0
    if collective.local:
        return device.launch + operand_bytes / device.memory_bandwidth + more
    return device.collective_seconds(collective.single, operand_bytes, mesh, axis) + more


@dataclass(eq=False)
class TensorClass:
    """All layouts of tensors with the same atoms and bytes an element, and the cheapest conversion between any two.

    `seconds[i, j]` is the time that converting layout i to layout j adds to a training step. For gradients, `sharing`
    prices the steps that run in buckets, and gives the part of them that backward hides.
    """

    sizes: tuple[int, ...]
    itemsize: int
    ops: tuple[str, ...]
    mesh: Mesh
    device: Hardware
    sharing: Sharing | None = None
    folds: Folds = ()
    among: Callable[[], StepGraph] | None = None
    """The layouts that are offered, where not all of them are."""

    @cached_property
    def graph(self) -> StepGraph:
        """The layouts and the steps between them, without seconds."""
        return self.among() if self.among else step_graph(self.sizes, self.mesh, self.ops, self.folds)

    @property
    def layouts(self) -> list[Splits]:
        return self.graph.layouts

    @property
    def index(self) -> dict[Splits, int]:
        return self.graph.index

    @cached_property
    def bytes(self) -> np.ndarray:
        """Bytes that a rank holds, per layout."""
        return np.array([self.local_bytes(splits) for splits in self.layouts])

    def local_bytes(self, splits: Splits) -> float:
        """Bytes that a rank holds, padding included."""
        return self.itemsize * self.graph.elements(splits)

    def operand_bytes(self, before: Splits, after: Splits, step: Step) -> float:
        """Bytes of a step's local operand, padded so that the atom which the step splits falls into even chunks."""
        return self.itemsize * self.graph.operand_elements(before, after, step)

    @cached_property
    def _load_seconds(self) -> np.ndarray:
        """Seconds of a step, per load."""
        return np.array(
            [
                self.step_seconds(kind, axis, self.itemsize * size, folded)
                for kind, axis, size, folded in self.graph.loads
            ]
        )

    def step_seconds(self, collective: AnyCollective, axis: str, moved: float, folded: bool = False) -> float:
        """Seconds of a step over `axis` whose local operand has `moved` bytes; `folded` is that of `step_seconds`."""
        if self.sharing is not None and collective.bucket is not None and moved and not folded:
            return self.sharing.seconds(collective, axis, moved, moved / self._whole)
        return step_seconds(collective, axis, moved, self.mesh, self.device, folded)

    @cached_property
    def _whole(self) -> int:
        """Bytes of the whole tensor."""
        return self.itemsize * math.prod(self.sizes)

    @cached_property
    def seconds(self) -> np.ndarray:
        if self.sharing is None:
            return self._cheapest[0]
        return self.sharing.exposed(*self._cheapest, self._whole)

    @cached_property
    def _cheapest(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of the cheapest conversion between any two layouts, and how many of these seconds backward cannot
        hide if the tensor is a gradient. Shortest paths after Floyd 1962 and Warshall 1962; among many layouts that are
        a part of all, after Dijkstra 1959."""
        before, after, loads = self.graph.columns
        if self.among is not None and self.sharing is None and len(self.layouts) > MANY_LAYOUTS:
            from scipy.sparse import csr_matrix  # slow to import, and few meshes have so many
            from scipy.sparse.csgraph import dijkstra

            moves = csr_matrix((self._load_seconds[loads], (before, after)), shape=(len(self.layouts),) * 2)
            table = dijkstra(moves)
            return table, table
        table = np.full((len(self.layouts),) * 2, np.inf)
        np.fill_diagonal(table, 0.0)
        visible = table.copy()
        table[before, after] = self._load_seconds[loads]
        if self.sharing is not None:
            shown = np.array([1.0 - self._hideable(*load) for load in self.graph.loads])
            visible[before, after] = (self._load_seconds * shown)[loads]
        through = np.empty_like(table)
        for k in range(len(table)):
            np.add(table[:, k, None], table[None, k, :], out=through)
            if self.sharing is not None:
                visible = np.where(through < table, visible[:, k, None] + visible[None, k, :], visible)
            np.minimum(table, through, out=table)
        return table, visible

    def _hideable(self, collective: AnyCollective, axis: str, elements: int, folded: bool) -> float:
        """The part (0 to 1) of a step's time that backward can hide; 0 unless the tensor is a gradient."""
        moved = self.itemsize * elements
        if self.sharing is None or collective.local or not moved or folded:
            return 0.0
        return self.sharing.hidden(collective, axis, moved, moved / self._whole)

    def path(self, start: Splits, end: Splits) -> list[Step]:
        """The steps of the cheapest conversion from `start` to `end`.

        Cheapest before anything is hidden: without `sharing`, the steps cost exactly `seconds[start, end]`.
        """
        if (start, end) not in self._paths:
            self._paths[start, end] = self._path(start, end)
        return self._paths[start, end]

    @cached_property
    def _paths(self) -> dict[tuple[Splits, Splits], list[Step]]:
        return {}

    def _path(self, start: Splits, end: Splits) -> list[Step]:
        first, goal = self.index[start], self.index[end]
        # breadth first, because a walk along cheapest moves may go in a circle where moves are free
        routes: dict[int, list[Step]] = {first: []}
        queue, seconds = deque([first]), self._cheapest[0]
        while goal not in routes:
            here = queue.popleft()
            moves = self.graph.moves[here]
            totals = {j: self._load_seconds[load] + seconds[j, goal] for j, (_, load) in moves.items()}
            least = min(totals.values())
            for there in sorted(j for j, total in totals.items() if total == least and j not in routes):
                routes[there] = [*routes[here], moves[there][0]]
                queue.append(there)
        return routes[goal]
