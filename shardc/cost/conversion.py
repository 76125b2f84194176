"""Layout conversions: the steps there are, what each sends and costs, and the cheapest path between any two layouts.

One table serves the solver (which adds up its entries) and lowering (which walks its paths), so the price of a
conversion is the price of exactly the collectives that are emitted.

What a collective costs is in `shardc/cost/collectives.py`. Inside the bodies of operators there is also permute, where
every rank sends to one other.
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
    """Seconds of one step whose local operand has `operand_bytes`."""
    if collective.local:
        return device.launch + operand_bytes / device.memory_bandwidth
    if mesh.sizes[axis] == 1:
        return 0.0
    return device.collective_seconds(collective, operand_bytes, mesh, axis)


@dataclass(eq=False)
class TensorClass:
    """All layouts of tensors with the same atoms and bytes an element, and the cheapest conversion between any two.

    `seconds[i, j]` is what converting layout i to layout j adds to a step. For gradients, `sharing` prices the steps
    that run in buckets, and tells what of them backward hides.
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
        """Per layout the bytes that a rank holds."""
        return np.array([self.local_bytes(splits) for splits in self.layouts])

    def local_bytes(self, splits: Splits) -> float:
        """Bytes that a rank holds, padding included."""
        return self.itemsize * math.prod(map(self.mesh.chunk, self.sizes, splits.axes))

    @cached_property
    def _moves(self) -> dict[int, dict[int, tuple[float, Step]]]:
        """Per layout, the layouts one step away with the seconds and the step."""
        moves: dict[int, dict[int, tuple[float, Step]]] = {}
        for i, splits in enumerate(self.layouts):
            found: dict[int, tuple[float, Step]] = {}
            for step in steps(splits, self.sizes, self.mesh, self.ops):
                after = apply(splits, step, self.mesh)
                found[self.index[after]] = self.step_seconds(step, self.operand_bytes(splits, after, step)), step
            moves[i] = found
        return moves

    def step_seconds(self, step: Step, moved: float) -> float:
        """Seconds of a step whose local operand has `moved` bytes."""
        if self.sharing is not None and step.collective.bucket is not None and moved:
            whole = self.itemsize * math.prod(self.sizes)
            return self.sharing.seconds(step.collective, step.axis, moved, moved / whole)
        return step_seconds(step.collective, step.axis, moved, self.mesh, self.device)

    def operand_bytes(self, before: Splits, after: Splits, step: Step) -> float:
        """Bytes of a step's local operand, padded to chunks of the atom that it splits."""
        if step.collective.keeps_part:
            return self.local_bytes(after)  # it writes only what it keeps
        size = self.local_bytes(before)
        if step.target is None or not size:
            return size
        atom, held = self.sizes[step.target], before.axes[step.target]
        chunk = self.mesh.chunk(atom, (*held, step.axis))
        return size / self.mesh.chunk(atom, held) * chunk * self.mesh.sizes[step.axis]

    @cached_property
    def seconds(self) -> np.ndarray:
        if self.sharing is None:
            return self._cheapest[0]
        return self.sharing.exposed(*self._cheapest, self.itemsize * math.prod(self.sizes))

    @cached_property
    def _cheapest(self) -> tuple[np.ndarray, np.ndarray]:
        """Between any two layouts the seconds of the cheapest conversion; and for how many of them, of a gradient,
        nothing can hide it."""
        table = np.full((len(self.layouts),) * 2, np.inf)
        np.fill_diagonal(table, 0.0)
        own = table.copy()
        for i, found in self._moves.items():
            for j, (cost, step) in found.items():
                table[i, j] = cost
                own[i, j] = cost * (1.0 - self._hideable(i, j, step))
        through = np.empty_like(table)
        for k in range(len(table)):  # Floyd-Warshall
            np.add(table[:, k, None], table[None, k, :], out=through)
            if self.sharing is not None:
                own = np.where(through < table, own[:, k, None] + own[None, k, :], own)
            np.minimum(table, through, out=table)
        return table, own

    def _hideable(self, before: int, after: int, step: Step) -> float:
        """What part of a step's time backward can hide, of a gradient."""
        if self.sharing is None or step.collective.local:
            return 0.0
        moved = self.operand_bytes(self.layouts[before], self.layouts[after], step)
        if not moved:
            return 0.0
        return self.sharing.hidden(step.collective, step.axis, moved, moved / (self.itemsize * math.prod(self.sizes)))

    def path(self, start: Splits, end: Splits) -> list[Step]:
        """The steps of the conversion that is cheapest where nothing hides it; there its price is that of `seconds`."""
        if (start, end) not in self._paths:
            self._paths[start, end] = self._path(start, end)
        return self._paths[start, end]

    @cached_property
    def _paths(self) -> dict[tuple[Splits, Splits], list[Step]]:
        return {}

    def _path(self, start: Splits, end: Splits) -> list[Step]:
        first, goal = self.index[start], self.index[end]
        # breadth first: where moves are free, the cheapest may go in a circle
        ways: dict[int, list[Step]] = {first: []}
        queue, seconds = deque([first]), self._cheapest[0]
        while goal not in ways:
            here = queue.popleft()
            totals = {j: cost + seconds[j, goal] for j, (cost, _) in self._moves[here].items()}
            least = min(totals.values())
            for there in sorted(j for j, total in totals.items() if total == least and j not in ways):
                ways[there] = [*ways[here], self._moves[here][there][1]]
                queue.append(there)
        return ways[goal]


def _enumerate(sizes: tuple[int, ...], mesh: Mesh, ops: tuple[str, ...]) -> Iterator[Splits]:
    options = [
        [None, *ops, *range(len(sizes))] if ways > 1 else [None] for _, ways in mesh.axes
    ]  # None: whole; str: partial; int: splits that atom
    for choice in itertools.product(*options):
        partial = tuple((axis, c) for axis, c in zip(mesh.names, choice, strict=True) if isinstance(c, str))
        if len({op for _, op in partial}) > 1:
            continue
        held = [tuple(a for a, c in zip(mesh.names, choice, strict=True) if c == atom) for atom in range(len(sizes))]
        if all(map(mesh.splits, sizes, held)):
            for order in itertools.product(*(itertools.permutations(axes) for axes in held)):
                yield Splits(tuple(order), partial)
