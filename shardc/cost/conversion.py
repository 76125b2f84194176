"""Layout conversions: the possible steps, what each sends and costs, and the cheapest path between any two layouts.

The solver adds up the entries of one table, and lowering walks the paths of the same table. So the price of a
conversion is the price of exactly the collectives that are emitted.

`shardc/cost/collectives.py` has the cost of each collective. Permute, where every rank sends to one other, is no step
of a conversion: only the bodies of operators use it.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shardc.cost.buckets import Sharing
from shardc.cost.hardware import Hardware
from shardc.ir.mesh import Mesh
from shardc.ir.splits import Splits, Step, apply, steps
from shardc.runtime.collectives.collective import AnyCollective


def step_seconds(collective: AnyCollective, axis: str, operand_bytes: float, mesh: Mesh, device: Hardware) -> float:
    """Seconds of one step over `axis` whose local operand has `operand_bytes` bytes; a local step costs a copy."""
    if collective.local:
        return device.launch + operand_bytes / device.memory_bandwidth
    if mesh.sizes[axis] == 1:
        return 0.0
    return device.collective_seconds(collective, operand_bytes, mesh, axis)


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

    @cached_property
    def layouts(self) -> list[Splits]:
        return list(_enumerate(self.sizes, self.mesh, self.ops))

    @cached_property
    def index(self) -> dict[Splits, int]:
        return {splits: i for i, splits in enumerate(self.layouts)}

    @cached_property
    def bytes(self) -> np.ndarray:
        """Bytes that a rank holds, per layout."""
        return np.array([self.local_bytes(splits) for splits in self.layouts])

    def local_bytes(self, splits: Splits) -> float:
        """Bytes that a rank holds, padding included."""
        return self.itemsize * math.prod(map(self.mesh.chunk, self.sizes, splits.axes))

    @cached_property
    def _moves(self) -> dict[int, dict[int, tuple[float, Step]]]:
        """Per layout, the layouts one step away, each with the seconds of that step and the step."""
        moves: dict[int, dict[int, tuple[float, Step]]] = {}
        for i, splits in enumerate(self.layouts):
            neighbours: dict[int, tuple[float, Step]] = {}
            for step in steps(splits, self.sizes, self.mesh, self.ops):
                after = apply(splits, step, self.mesh)
                neighbours[self.index[after]] = self.step_seconds(step, self.operand_bytes(splits, after, step)), step
            moves[i] = neighbours
        return moves

    def step_seconds(self, step: Step, moved: float) -> float:
        """Seconds of a step whose local operand has `moved` bytes."""
        if self.sharing is not None and step.collective.bucket is not None and moved:
            whole = self.itemsize * math.prod(self.sizes)
            return self.sharing.seconds(step.collective, step.axis, moved, moved / whole)
        return step_seconds(step.collective, step.axis, moved, self.mesh, self.device)

    def operand_bytes(self, before: Splits, after: Splits, step: Step) -> float:
        """Bytes of a step's local operand, padded so that the atom which the step splits falls into even chunks."""
        if step.collective.keeps_part:
            return self.local_bytes(after)  # the rank writes only the chunk that it keeps
        size = self.local_bytes(before)
        if step.target is None or not size:
            return size
        atom, axes = self.sizes[step.target], before.axes[step.target]
        chunk = self.mesh.chunk(atom, (*axes, step.axis))
        return size / self.mesh.chunk(atom, axes) * chunk * self.mesh.sizes[step.axis]

    @cached_property
    def seconds(self) -> np.ndarray:
        if self.sharing is None:
            return self._cheapest[0]
        return self.sharing.exposed(*self._cheapest, self.itemsize * math.prod(self.sizes))

    @cached_property
    def _cheapest(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of the cheapest conversion between any two layouts, and how many of these seconds backward cannot
        hide if the tensor is a gradient. Shortest paths after Floyd 1962 and Warshall 1962."""
        table = np.full((len(self.layouts),) * 2, np.inf)
        np.fill_diagonal(table, 0.0)
        visible = table.copy()
        for i, neighbours in self._moves.items():
            for j, (cost, step) in neighbours.items():
                table[i, j] = cost
                visible[i, j] = cost * (1.0 - self._hideable(i, j, step))
        through = np.empty_like(table)
        for k in range(len(table)):
            np.add(table[:, k, None], table[None, k, :], out=through)
            if self.sharing is not None:
                visible = np.where(through < table, visible[:, k, None] + visible[None, k, :], visible)
            np.minimum(table, through, out=table)
        return table, visible

    def _hideable(self, before: int, after: int, step: Step) -> float:
        """The part (0 to 1) of a step's time that backward can hide; 0 unless the tensor is a gradient."""
        if self.sharing is None or step.collective.local:
            return 0.0
        moved = self.operand_bytes(self.layouts[before], self.layouts[after], step)
        if not moved:
            return 0.0
        return self.sharing.hidden(step.collective, step.axis, moved, moved / (self.itemsize * math.prod(self.sizes)))

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
            totals = {j: cost + seconds[j, goal] for j, (cost, _) in self._moves[here].items()}
            least = min(totals.values())
            for there in sorted(j for j, total in totals.items() if total == least and j not in routes):
                routes[there] = [*routes[here], self._moves[here][there][1]]
                queue.append(there)
        return routes[goal]


def _enumerate(sizes: tuple[int, ...], mesh: Mesh, ops: tuple[str, ...]) -> Iterator[Splits]:
    options = [
        [None, *ops, *range(len(sizes))] if ranks > 1 else [None] for _, ranks in mesh.axes
    ]  # None leaves the tensor whole, a str makes it partial, an int splits that atom
    for choice in itertools.product(*options):
        partial = tuple((axis, c) for axis, c in zip(mesh.names, choice, strict=True) if isinstance(c, str))
        if len({op for _, op in partial}) > 1:
            continue
        splitting = [
            tuple(a for a, c in zip(mesh.names, choice, strict=True) if c == atom) for atom in range(len(sizes))
        ]
        if all(map(mesh.splits, sizes, splitting)):
            for order in itertools.product(*(itertools.permutations(axes) for axes in splitting)):
                yield Splits(tuple(order), partial)
