"""Strategies: for one operator, what every mesh axis does. An axis splits one factor, or nothing, or lets partials
pass.

An operator's options depend only on its `Shape`, so they are derived once per shape and shared by all its repetitions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from shardc.cost.conversion import Splits, TensorClass, step_seconds
from shardc.cost.hardware import Hardware
from shardc.graph import value_of
from shardc.mesh import Mesh
from shardc.rules.factoring import Factor, Factored, Op, Operand, Result, carried


class Strategy(NamedTuple):
    """Per factor the axes that split it, major to minor; per passing axis the linear group that is partial on it."""

    split: tuple[tuple[str, ...], ...]
    passes: tuple[tuple[str, int], ...] = ()


class Side(NamedTuple):
    """One operand or result: its base value's atoms, and per own leaf (base atom or None, factor or None)."""

    sizes: tuple[int, ...]
    itemsize: int
    leaves: tuple[tuple[int | None, int | None], ...]
    names: frozenset[str]


class Shape(NamedTuple):
    """All that an operator's strategies and costs depend on."""

    factors: tuple[Factor, ...]
    operands: tuple[Side, ...]
    results: tuple[Side, ...]
    reductions: tuple[tuple[str, str], ...]
    linear: tuple[frozenset[int], ...]
    reads: tuple[frozenset[int], ...] | None
    flops: tuple[str, ...]
    dtype: torch.dtype
    complete: frozenset[str]
    """Parted factors whose body makes complete results."""
    indices: frozenset[int]
    """Operands that hold indices, or numbers that count as such: garbage in their padding would be out of range."""
    computes: bool
    """Whether it is an operator; a placeholder costs nothing."""
    even: bool
    """Whether padding could make the operator fail, so that no factor may be split unevenly."""
    multiplied: frozenset[int]
    """Operands that are not additive though they are in every linear group."""


def shape_of(factored: Factored, op: Op) -> Shape:
    """The shape of an operator in a program."""
    outputs = value_of(op.node)
    first = next(v for v in outputs if v is not None) if isinstance(outputs, (tuple, list)) else outputs
    return Shape(
        tuple(op.factors),
        tuple(_side(factored, op, item) for item in op.operands),
        tuple(_side(factored, op, item) for item in op.results),
        tuple(sorted(op.rule.reductions.items())),
        op.rule.linear,
        tuple(op.rule.reads[result.key[1]] for result in op.results) if op.rule.reads else None,
        op.rule.flops,
        first.dtype,
        op.rule.parted - set(op.rule.reductions),
        _integers(op),
        op.node.op != "placeholder",
        op.rule.even,
        op.rule.multiplied,
    )


def _integers(op: Op) -> frozenset[int]:
    """The integer operands of an operator that is not elementwise."""
    if len({op.rule.results[0], *op.rule.operands}) == 1 and not op.rule.parted:
        return frozenset()
    kinds = [value_of(operand.node).dtype for operand in op.operands]
    return frozenset(i for i, dtype in enumerate(kinds) if not (dtype.is_floating_point or dtype.is_complex))


def _side(factored: Factored, op: Op, item: Operand | Result) -> Side:
    key = item.value.key
    position = {ref: i for i, ref in enumerate(factored.leaves(key))}
    producer = value_of(key[0])
    value = producer[key[1]] if isinstance(producer, (tuple, list)) else producer
    leaves = tuple((position.get(ref), factor) for ref, factor in carried(factored, item, op.factors))
    return Side(factored.sizes(key), value.element_size(), leaves, frozenset(n for n in item.names if n))


@dataclass(eq=False)
class Options:
    """Every strategy of one shape, the layouts each demands and makes, and its seconds of compute."""

    shape: Shape
    mesh: Mesh
    device: Hardware
    operand_classes: list[TensorClass]
    result_classes: list[TensorClass]

    @cached_property
    def strategies(self) -> list[Strategy]:
        return [s for s in _enumerate(self.shape, self.mesh) if _one_reduction(self.shape, s, self.mesh)]

    @cached_property
    def operand_layouts(self) -> list[np.ndarray]:
        """Per operand, the index of the demanded layout in its class, one entry a strategy."""
        return [
            np.array([c.index[demand(self.shape, s, k, self.mesh)] for s in self.strategies])
            for k, c in enumerate(self.operand_classes)
        ]

    @cached_property
    def result_layouts(self) -> list[np.ndarray]:
        """Per result, the index of the layout made, one entry a strategy."""
        return [
            np.array([c.index[make(self.shape, s, k, self.mesh)] for s in self.strategies])
            for k, c in enumerate(self.result_classes)
        ]

    @cached_property
    def seconds(self) -> np.ndarray:
        """Seconds of each strategy: compute, and the collectives inside its body."""
        inner = [
            sum(step_seconds(*sent, self.mesh, self.device) for sent in sends(self.shape, s, self.mesh))
            for s in self.strategies
        ]
        return self.compute + np.array(inner)

    @cached_property
    def compute(self) -> np.ndarray:
        """Compute seconds of each strategy."""
        return np.array([self.compute_of(s) for s in self.strategies])

    def compute_of(self, strategy: Strategy) -> float:
        """Compute seconds of one strategy; what an operator makes from nothing is written all the same."""
        if not self.shape.computes:
            return 0.0
        chunks = [self.mesh.chunk(f.size, axes) for f, axes in zip(self.shape.factors, strategy.split, strict=True)]
        sides = (*self.shape.operands, *self.shape.results)
        passes = [1 + 2 * len(masks(self.shape, strategy, k, self.mesh)) for k in range(len(self.shape.operands))]
        passes += [1] * len(self.shape.results)
        moved = sum(side.itemsize * self._local(side, chunks) * n for side, n in zip(sides, passes, strict=True))
        flops = 0.0
        for product in self.shape.flops:
            names = set(product.split())
            flops += 2 * math.prod(c for f, c in zip(self.shape.factors, chunks, strict=True) if f.name in names)
        return self.device.compute_seconds(flops, moved, self.shape.dtype)

    def _local(self, side: Side, chunks: list[int]) -> int:
        """Elements of a side that a rank reads or writes; a dim that is expanded is read once."""
        own = {base: factor for base, factor in side.leaves if base is not None}
        found = 1
        for base, size in enumerate(side.sizes):
            factor = own.get(base)  # its size is a divisor of the dim's, if it is that of a window
            found *= size if factor is None else size // max(self.shape.factors[factor].size, 1) * chunks[factor]
        return found


IDENTITY = {"sum": 0.0, "prod": 1.0, "max": float("-inf"), "min": float("inf")}


def masks(shape: Shape, strategy: Strategy, operand: int, mesh: Mesh) -> dict[int, float]:
    """The factors along whose padding an operand must be filled before the operator runs, and with what: those that it
    carries unevenly and that the operator reduces (the identity), and all in operands of indices (0, a valid index)."""
    side, found = shape.operands[operand], dict[int, float]()
    reductions = dict(shape.reductions)
    for position, (factor, axes) in enumerate(zip(shape.factors, strategy.split, strict=True)):
        if factor.parting or factor.name not in side.names or factor.size % mesh.ways(axes) == 0:
            continue  # a parted factor's body sees to its padding
        if _reduced(shape, factor.name):
            found[position] = IDENTITY[reductions.get(factor.name, "sum")]
        elif operand in shape.indices:
            found[position] = 0.0
    return found


def sends(shape: Shape, strategy: Strategy, mesh: Mesh) -> Iterator[tuple[str, str, float]]:
    """The collectives inside the body of a strategy: kind, axis, bytes of the local operand."""
    split = {f.name for f, axes in zip(shape.factors, strategy.split, strict=True) if axes}
    for factor, axes in zip(shape.factors, strategy.split, strict=True):
        for send in factor.parting.sends if factor.parting and axes else ():
            if send.parts not in (None, mesh.ways(axes)) or not split.issuperset(send.beside):
                continue
            pairs = zip(shape.factors, strategy.split, strict=True)
            size = math.prod(mesh.chunk(f.size, held) for f, held in pairs if f.name in send.factors)
            size *= send.itemsize * send.elements
            for axis in reversed(axes):
                yield send.kind, axis, size
                size *= mesh.sizes[axis] if send.kind == "all_gather" else 1


def _enumerate(shape: Shape, mesh: Mesh) -> Iterator[Strategy]:
    free = [i for i, factor in enumerate(shape.factors) if not factor.whole]
    options: list[list[int | str | None]] = [
        [None, *free, *(f"group {g}" for g in range(len(shape.linear)))] if ways > 1 else [None]
        for _, ways in mesh.axes
    ]  # None: nothing is split; int: that factor; str: that linear group passes
    for choice in itertools.product(*options):
        passes = tuple((a, int(c[6:])) for a, c in zip(mesh.names, choice, strict=True) if isinstance(c, str))
        held = [
            tuple(a for a, c in zip(mesh.names, choice, strict=True) if c == i and isinstance(c, int))
            for i in range(len(shape.factors))
        ]
        if all(_splittable(shape, f, axes, mesh) for f, axes in zip(shape.factors, held, strict=True)):
            for order in itertools.product(*(itertools.permutations(axes) for axes in held)):
                yield Strategy(tuple(order), passes)


def legal(shape: Shape, strategy: Strategy, mesh: Mesh) -> bool:
    """Whether an operator of this shape has the strategy; its factors must be the strategy's."""
    pairs = zip(shape.factors, strategy.split, strict=True)
    return all(_splittable(shape, f, axes, mesh) for f, axes in pairs) and _one_reduction(shape, strategy, mesh)


def _one_reduction(shape: Shape, strategy: Strategy, mesh: Mesh) -> bool:
    """A tensor is partial by one reduction at most."""
    sides = [demand(shape, strategy, k, mesh) for k in range(len(shape.operands))]
    made = [make(shape, strategy, k, mesh) for k in range(len(shape.results))]
    return all(len({op for _, op in splits.partial}) < 2 for splits in (*sides, *made))


def _splittable(shape: Shape, factor: Factor, axes: tuple[str, ...], mesh: Mesh) -> bool:
    """Whether `axes` may split a factor. With padding where nothing mixes the padding in: the factor is parted, or not
    reduced, or reduced by an operator that makes zero of zeros."""
    parting = factor.parting
    if axes and parting is not None and parting.parts is not None:
        return len(axes) == 1 and mesh.ways(axes) in parting.parts
    if factor.size % mesh.ways(axes) == 0:
        return True
    if shape.even or not mesh.splits(factor.size, axes):
        return False
    if parting is not None or not _reduced(shape, factor.name):
        return True
    if dict(shape.reductions).get(factor.name, "sum") != "sum":
        return len(shape.operands) == 1 and not shape.indices  # integers have no infinity
    return any(any(factor.name in shape.operands[k].names for k in group) for group in shape.linear)


def demand(shape: Shape, strategy: Strategy, operand: int, mesh: Mesh) -> Splits:
    """The layout in which a strategy needs an operand's base value."""
    side = shape.operands[operand]
    partial = {axis: "sum" for axis, group in strategy.passes if operand in shape.linear[group]}
    always = bool(shape.linear) and all(operand in group for group in shape.linear)
    if always and operand not in shape.multiplied:
        for factor, axes in zip(shape.factors, strategy.split, strict=True):
            if factor.name not in side.names and _reduced(shape, factor.name):
                partial |= dict.fromkeys(axes, "sum")
    return _splits(side, strategy, partial, mesh)


def make(shape: Shape, strategy: Strategy, result: int, mesh: Mesh) -> Splits:
    """The layout in which a strategy makes a result."""
    side = shape.results[result]
    reductions = dict(shape.reductions)
    partial = {axis: "sum" for axis, _ in strategy.passes}
    for factor, axes in zip(shape.factors, strategy.split, strict=True):
        if _reduced_in(shape, factor.name, result):
            partial |= dict.fromkeys(axes, reductions.get(factor.name, "sum"))
    return _splits(side, strategy, partial, mesh)


def _reduced_in(shape: Shape, name: str, result: int) -> bool:
    read = shape.reads[result] if shape.reads else range(len(shape.operands))
    if name in shape.complete or name in shape.results[result].names:
        return False
    return any(name in shape.operands[k].names for k in read)


def _reduced(shape: Shape, name: str) -> bool:
    return any(_reduced_in(shape, name, k) for k in range(len(shape.results)))


def _splits(side: Side, strategy: Strategy, partial: dict[str, str], mesh: Mesh) -> Splits:
    axes: list[tuple[str, ...]] = [() for _ in side.sizes]
    for base, factor in side.leaves:
        if base is not None and factor is not None:
            axes[base] = strategy.split[factor]
    return Splits(tuple(axes), tuple((a, partial[a]) for a in mesh.names if a in partial))
