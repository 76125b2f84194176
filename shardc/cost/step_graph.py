"""The layouts that a tensor may have and the steps between them, with what each step moves, before anything is priced.

f32[32, 64] on tp=2     [32, 64]    -shard-       [32@tp, 64]     0 elements sent
                        [32@tp, 64] -all_gather-  [32, 64]        operand of 16 x 64 elements
                        ...
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from shardc.ir.mesh import Mesh
from shardc.ir.splits import Folds, Splits, Step, apply, folded, steps
from shardc.runtime.collectives.collective import AnyCollective
from shardc.runtime.mesh.orders import FOLDED, in_order

Load = tuple[AnyCollective, str, int, bool]
"""A collective, its axis, the elements of its local operand, and whether a dim is folded: steps with one load take
equally long."""


@dataclass(frozen=True, eq=False)
class StepGraph:
    """All layouts of tensors whose atoms have these sizes, or those `listed`, and all steps between them, on one mesh.

    `moves` has, per layout, the layouts one step away, each with the step and the number of its load in `loads`.
    `columns` lists the same: layouts before, layouts after, numbers of loads.
    """

    sizes: tuple[int, ...]
    mesh: Mesh
    ops: tuple[str, ...]
    folds: Folds = ()
    listed: tuple[Splits, ...] | None = None

    @cached_property
    def layouts(self) -> list[Splits]:
        return list(self.listed if self.listed is not None else _enumerate(self.sizes, self.mesh, self.ops, self.folds))

    @cached_property
    def index(self) -> dict[Splits, int]:
        return {splits: i for i, splits in enumerate(self.layouts)}

    def elements(self, splits: Splits) -> int:
        """Elements that a rank holds, padding included."""
        return math.prod(map(self.mesh.chunk, self.sizes, splits.axes))

    def operand_elements(self, before: Splits, after: Splits, step: Step) -> int:
        """Elements of a step's local operand, padded so that the atom which the step splits falls into even chunks."""
        if step.collective.keeps_part:
            return self.elements(after)  # the rank writes only the chunk that it keeps
        size = self.elements(before)
        if step.target in (None, step.source) or not size:
            return size
        assert step.target is not None
        atom, axes = self.sizes[step.target], before.axes[step.target]
        chunk = self.mesh.chunk(atom, (*axes, step.axis))
        return size // self.mesh.chunk(atom, axes) * chunk * self.mesh.sizes[step.axis]

    @cached_property
    def _walked(self) -> tuple[list[dict[int, tuple[Step, int]]], list[Load]]:
        """`moves` and `loads`."""
        numbers: dict[Load, int] = {}
        moves: list[dict[int, tuple[Step, int]]] = []
        for splits in self.layouts:
            neighbours: dict[int, tuple[Step, int]] = {}
            for step in steps(splits, self.sizes, self.mesh, self.ops, self.folds):
                after = apply(splits, step, self.mesh)
                if after not in self.index:
                    continue
                load = step.collective, step.axis, self.operand_elements(splits, after, step), bool(step.orders)
                neighbours[self.index[after]] = step, numbers.setdefault(load, len(numbers))
            moves.append(neighbours)
        return moves, list(numbers)

    @property
    def moves(self) -> list[dict[int, tuple[Step, int]]]:
        return self._walked[0]

    @property
    def loads(self) -> list[Load]:
        return self._walked[1]

    @cached_property
    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = [(i, j, load) for i, neighbours in enumerate(self.moves) for j, (_, load) in neighbours.items()]
        before, after, loads = np.array(rows, dtype=np.intp).reshape(-1, 3).T
        return before, after, loads


@lru_cache(maxsize=512)
def step_graph(sizes: tuple[int, ...], mesh: Mesh, ops: tuple[str, ...], folds: Folds = ()) -> StepGraph:
    """The graph of tensors of these sizes. It depends on neither device nor dtype, so that compilations share it."""
    return StepGraph(sizes, mesh, ops, folds)


def _enumerate(sizes: tuple[int, ...], mesh: Mesh, ops: tuple[str, ...], folds: Folds) -> Iterator[Splits]:
    options: list[list[int | str | tuple[int] | None]] = [
        [None, *ops, *range(len(sizes)), *((a,) for a in folded(axis, sizes, mesh, folds))] if ranks > 1 else [None]
        for axis, ranks in mesh.axes
    ]  # None leaves the tensor whole, a str makes it partial, an int splits that atom, an int in a tuple folds it
    for choice in itertools.product(*options):
        partial = tuple([(axis, c) for axis, c in zip(mesh.names, choice, strict=True) if isinstance(c, str)])
        if len({op for _, op in partial}) > 1:
            continue
        splitting: list[tuple[str, ...]] = [()] * len(sizes)
        for axis, atom in zip(mesh.names, choice, strict=True):
            if isinstance(atom, int):
                splitting[atom] += (axis,)
            elif isinstance(atom, tuple):
                splitting[atom[0]] += (in_order(axis, FOLDED),)
        if all(map(mesh.splits, sizes, splitting)):
            for order in itertools.product(*map(itertools.permutations, splitting)):
                yield Splits(order, partial)
