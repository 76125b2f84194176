"""A strategy for one operator: what every mesh axis does there, and which variant runs.

An axis splits one factor (or a group that the variant splits together), or it splits nothing, or partial operands pass
to partial results over it. The layouts of operands and results, the bytes sent and the flops of a strategy depend only
on the operator's `Shape`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from shardc.ir.layout import is_folded
from shardc.ir.mesh import Mesh
from shardc.ir.program import value_of
from shardc.ir.splits import Folds, Splits
from shardc.rules.drawn import Drawn
from shardc.rules.factors import exchanges as exchange
from shardc.rules.factors import rings
from shardc.rules.factors.factored import Factor, Op, Operand, Result
from shardc.rules.factors.fused import Fused
from shardc.rules.notation import Band, RowBound, Variant, Workspace
from shardc.runtime.mesh.orders import axis_of

PLAIN = ""
"""The variant where no parted factor is split: the operator itself, on local tensors."""


class Strategy(NamedTuple):
    """What every mesh axis does in one operator.

    `split` lists, per factor, the axes that split it, major to minor, each with its order. `passes` lists axes over
    which a linear group of operands is partial, with the index of the group. With `again`, backward recomputes the
    results instead of keeping them. `variant` names the variant that runs.
    """

    split: tuple[tuple[str, ...], ...]
    passes: tuple[tuple[str, int], ...] = ()
    again: bool = False
    variant: str = PLAIN


@dataclass(frozen=True)
class Side:
    """One operand or result: the sizes of its base value's atoms, and (base atom or None, factor or None) per leaf."""

    sizes: tuple[int, ...]
    itemsize: int
    leaves: tuple[tuple[int | None, int | None], ...]
    names: frozenset[str]
    folds: Folds = ()

    @cached_property
    def factors(self) -> tuple[int | None, ...]:
        """For each base atom, the factor that it is, or None."""
        factor_of = {base: factor for base, factor in self.leaves if base is not None and factor is not None}
        return tuple(map(factor_of.get, range(len(self.sizes))))

    @cached_property
    def carried(self) -> frozenset[int]:
        """The factors of its dims."""
        return frozenset(factor for _, factor in self.leaves if factor is not None)


@dataclass(frozen=True)
class Shape:
    """All facts on which an operator's strategies and costs depend. Operators of one kind have equal shapes."""

    factors: tuple[Factor, ...]
    operands: tuple[Side, ...]
    results: tuple[Side, ...]
    reductions: tuple[tuple[str, str], ...]
    linear: tuple[frozenset[int], ...]
    reads: tuple[frozenset[int], ...] | None
    flops: tuple[str, ...]
    dtype: torch.dtype
    complete: frozenset[str]
    """Parted factors over which the body completes the results."""
    indices: frozenset[int]
    """Operands that hold indices, or may: garbage in their padding would be out of range."""
    computes: bool
    """Whether it is an operator, and no placeholder, which costs nothing."""
    even: bool
    """Whether padding could make the operator fail; then nothing is split unevenly."""
    multiplied: frozenset[int]
    """Operands that are in every linear group and yet not additive."""
    drawn: Drawn | None
    """The random numbers that a rank draws."""
    variants: tuple[Variant, ...]
    workspace: tuple[Workspace, ...]
    """What the operator itself allocates and frees again."""
    band: Band | None
    """The pairs of two factors that are computed."""
    fused: Fused

    @cached_property
    def groups(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """For each variant, the groups of factors that one axis splits together. Incomplete groups are left out."""
        major = {factor.name: i for i, factor in enumerate(self.factors) if factor.index == 0 and not factor.whole}
        return {
            variant.name: tuple(
                tuple(major[name] for name in group) for group in variant.together if major.keys() >= set(group)
            )
            for variant in self.variants
        }

    @cached_property
    def exchanges(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """For each variant that exchanges the parts of two factors, the first, and the atoms of the second."""
        return exchange.exchanges_of(self)

    @cached_property
    def rings(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """For each variant with a ring, the pairs of factors that one axis may split."""
        return rings.pairs_of(self)

    @cached_property
    def bundles(self) -> tuple[tuple[int, ...], ...]:
        """The factors that one axis may split at once: the groups of all variants and what they exchange, each once."""
        groups = [group for groups in self.groups.values() for group in groups]
        exchanged = [(first, second) for first, seconds in self.exchanges.values() for second in seconds]
        return tuple(dict.fromkeys([*groups, *exchanged]))

    def variant_of(self, strategy: Strategy) -> Variant | None:
        """The variant that a strategy runs; None where the operator itself runs."""
        return next((one for one in self.variants if one.name == strategy.variant), None)

    @cached_property
    def reduced(self) -> dict[int, str]:
        """The factors over which some result is reduced, with the reduction."""
        return {factor: op for factors in self.reduced_in for factor, op in factors.items()}

    @cached_property
    def reduced_in(self) -> tuple[dict[int, str], ...]:
        """For each result, the factors over which it is reduced, with the reduction."""
        return tuple(self._reduced_in(result) for result in range(len(self.results)))

    def _reduced_in(self, result: int) -> dict[int, str]:
        read = self.reads[result] if self.reads else range(len(self.operands))
        names = {name for k in read for name in self.operands[k].names} - self.complete - self.results[result].names
        how = dict(self.reductions)
        return {i: how.get(f.name, "sum") for i, f in enumerate(self.factors) if f.name in names}

    @cached_property
    def addends(self) -> tuple[frozenset[int], ...]:
        """For each operand, the factors that make it partial if they are split."""
        return tuple(
            frozenset(i for i in self.reduced if self.factors[i].name not in side.names)
            if self.linear and k not in self.multiplied and all(k in group for group in self.linear)
            else frozenset[int]()
            for k, side in enumerate(self.operands)
        )

    @cached_property
    def filled(self) -> tuple[dict[int, float], ...]:
        """For each operand, the factors along which its padding must be filled, and the values (see `masks`)."""
        return tuple(self._filled(k, side) for k, side in enumerate(self.operands))

    def _filled(self, operand: int, side: Side) -> dict[int, float]:
        values: dict[int, float] = {}
        for position, factor in enumerate(self.factors):
            if factor.parting or factor.name not in side.names:
                continue  # the body of a parted factor fills its padding
            if position in self.reduced:
                values[position] = IDENTITY[self.reduced[position]]
            elif operand in self.indices:
                values[position] = 0.0
        return values

    @cached_property
    def products(self) -> tuple[tuple[float, tuple[int, ...]], ...]:
        """For each matrix product of the operator, the part of its points that counts, and its factors."""
        return tuple(
            (exchange.part_of(product), tuple(i for i, f in enumerate(self.factors) if f.name in product.split()))
            for product in self.flops
        )

    @cached_property
    def mixes(self) -> bool:
        """Whether some strategy could make a result partial by two reductions."""
        passing = {"sum"} if self.linear else set[str]()
        return any(len(passing.union(factors.values())) > 1 for factors in self.reduced_in)


def shape_of(op: Op) -> Shape:
    """The shape of an operator in a program. Operators of one kind have equal ones."""
    outputs = value_of(op.node)
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    carried = iter(op.kind.carried)
    return Shape(
        tuple(op.factors),
        tuple(_side(item, value_of(item.node), next(carried)) for item in op.operands),
        tuple(_side(item, outputs[item.key[1]], next(carried)) for item in op.results),
        tuple(sorted(op.rule.reductions.items())),
        op.rule.linear,
        tuple(op.rule.reads[result.key[1]] for result in op.results) if op.rule.reads else None,
        op.rule.flops,
        next(v for v in outputs if v is not None).dtype,
        op.rule.parted - set(op.rule.reductions),
        _integers(op),
        op.node.op != "placeholder",
        op.rule.even,
        op.rule.multiplied,
        op.rule.drawn,
        op.rule.variants,
        op.rule.workspace,
        op.rule.band,
        op.kind.fused,
    )


def _integers(op: Op) -> frozenset[int]:
    """The integer operands of an operator that is not elementwise.

    Booleans count only without reductions, since max and min of booleans have an identity, like those of floats.
    """
    if len({op.rule.results[0], *op.rule.operands}) == 1 and not op.rule.parted:
        return frozenset()
    dtypes = [value_of(operand.node).dtype for operand in op.operands]
    extremes = bool(op.rule.reductions)
    return frozenset(
        i for i, dtype in enumerate(dtypes)
        if not (dtype.is_floating_point or dtype.is_complex or (extremes and dtype is torch.bool))
    )  # fmt: skip


def _side(item: Operand | Result, tensor: torch.Tensor, carried: list[int | None]) -> Side:
    form = item.value.form
    leaves = tuple(zip(form.places, carried, strict=True))
    return Side(form.base, tensor.element_size(), leaves, frozenset(n for n in item.names if n), form.folds)


IDENTITY = {"sum": 0.0, "prod": 1.0, "max": float("-inf"), "min": float("inf")}


def masks(shape: Shape, strategy: Strategy, operand: int, mesh: Mesh) -> dict[int, float]:
    """The factors along which an operand's padding must be filled before the operator runs, with the values.

    Only unevenly split factors count. Factors that the operator reduces get the identity of the reduction. The others
    get 0, a valid index, if the operand holds indices.
    """
    split = split_of(shape, strategy, shape.operands[operand].carried)
    return {
        position: value for position, value in shape.filled[operand].items()
        if shape.factors[position].size % mesh.ways(split[position])
    }  # fmt: skip


def workspace(shape: Shape, strategy: Strategy, mesh: Mesh) -> int:
    """Bytes that the operator, or the body of a strategy's variant, allocates and frees again."""
    variant, circle = shape.variant_of(strategy), rings.circle_of(shape, strategy)
    if circle is not None:
        return rings.workspace_of_ring(shape, strategy, circle, mesh)
    needed = shape.workspace if variant is None else variant.workspace
    if not needed:
        return 0
    chunks = [mesh.chunk(f.size, axes) for f, axes in zip(shape.factors, strategy.split, strict=True)]
    ways = {f.name: mesh.ways(axes) for f, axes in zip(shape.factors, strategy.split, strict=True) if axes}
    stages: Counter[int] = Counter()

    def points(factors: tuple[str, ...]) -> int:
        return math.prod(chunk for f, chunk in zip(shape.factors, chunks, strict=True) if f.name in factors)

    def rows(bound: RowBound | None) -> int:
        if bound is None:
            return 1
        senders = exchange.senders(shape, strategy, mesh)
        return exchange.rows_at_most(bound, points((bound.of,)), points((bound.to,)), senders)

    for one in needed:
        if all(ways.get(name, 1) >= one.parts for name in one.beside):
            size = int(points(one.factors) * rows(one.bound) * one.itemsize * one.elements)
            stages[one.stage] += size if one.most is None else min(size, one.most)
    return max(stages.values(), default=0)


def split_of(shape: Shape, strategy: Strategy, carried: Collection[int]) -> tuple[tuple[str, ...], ...]:
    """For each factor, the axes that split it in a tensor or product with the factors `carried`.

    Of a group that the variant splits together, only the first of the carried factors is split; of two that it
    exchanges, the second; of two in a ring, that which stays.
    """
    circle = rings.circle_of(shape, strategy)
    if circle is not None:
        return rings.split_in_ring(circle, strategy.split, carried)
    groups = shape.groups.get(strategy.variant)
    if not groups:
        return exchange.split_by_second(shape, strategy, carried)
    later = {i for group in groups for i in [i for i in group if i in carried][1:]}
    return tuple(() if i in later else axes for i, axes in enumerate(strategy.split))


def legal(shape: Shape, strategy: Strategy, mesh: Mesh) -> bool:
    """Whether an operator of this shape may run with the strategy, whose `split` has one entry for each factor."""
    splits = all(splittable(shape, i, axes, mesh) for i, axes in enumerate(strategy.split))
    runs = strategy.variant in variants_of(shape, strategy.split)
    return splits and runs and one_reduction(shape, strategy, mesh)


def variants_of(shape: Shape, split: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """The variants that may run with this split. If no parted factor is split, that is the plain one; or, where an axis
    splits two factors, what has them in a ring."""
    if not any(factor.parting and axes for factor, axes in zip(shape.factors, split, strict=True)):
        axes = [axis_of(axis) for several in split for axis in several] if shape.rings else []
        if len(axes) == len(set(axes)):
            return (PLAIN,)
        return tuple([v.name for v in shape.variants if v.name in shape.rings and rings.can_circle(shape, v, split)])
    return tuple(variant.name for variant in shape.variants if _runs(shape, variant, split))


def _runs(shape: Shape, variant: Variant, split: tuple[tuple[str, ...], ...]) -> bool:
    """Whether the factors of each group are split alike, no axis splits two factors that share no group, and the body
    reads those that are folded."""
    parted = (
        factor.name for factor, axes in zip(shape.factors, split, strict=True) if factor.parting and is_folded(axes)
    )
    if not variant.folds.issuperset(parted):
        return False
    if variant.exchange is not None:
        return exchange.can_exchange(shape, variant, split)
    groups = shape.groups[variant.name]
    alike = all(split[i] == split[group[0]] for group in groups for i in group)
    later = {i for group in groups for i in group[1:]}
    axes = [axis_of(axis) for i, split_by in enumerate(split) if i not in later for axis in split_by]
    used = not variant.together or any(split[group[0]] for group in groups)
    return alike and used and len(axes) == len(set(axes))


def one_reduction(shape: Shape, strategy: Strategy, mesh: Mesh) -> bool:
    """Whether every result is partial by at most one reduction."""
    if not shape.mixes:
        return True
    results = [make(shape, strategy, k, mesh) for k in range(len(shape.results))]
    return all(len({op for _, op in splits.partial}) < 2 for splits in results)


def splittable(shape: Shape, position: int, axes: tuple[str, ...], mesh: Mesh) -> bool:
    """Whether `axes` may split a factor.

    They may split it unevenly if padding cannot change a result: the factor is parted, or not reduced, or its padding
    can be filled with the identity of the reduction.
    """
    factor = shape.factors[position]
    parting = factor.parting
    if is_folded(axes):
        return axis_of(axes[0]) in factor.folds and len(axes) == 1 and mesh.splits(factor.size, axes)
    if axes and parting is not None and parting.parts is not None:
        return len(axes) == 1 and mesh.ways(axes) in parting.parts
    if factor.size % mesh.ways(axes) == 0:
        return True
    if shape.even or not mesh.splits(factor.size, axes):
        return False
    if parting is not None or position not in shape.reduced:
        return True
    if shape.reduced[position] != "sum":
        return len(shape.operands) == 1 and not shape.indices  # integers have no infinity
    return any(any(factor.name in shape.operands[k].names for k in group) for group in shape.linear)


def demand(shape: Shape, strategy: Strategy, operand: int, mesh: Mesh) -> Splits:
    """The layout that a strategy demands of an operand's base value."""
    partial = {axis: "sum" for axis, group in strategy.passes if operand in shape.linear[group]}
    for factor in shape.addends[operand]:
        partial |= {axis: "sum" for axis in map(axis_of, strategy.split[factor]) if axis not in _round(shape, strategy)}
    return _splits(shape, shape.operands[operand], strategy, partial, mesh)


def make(shape: Shape, strategy: Strategy, result: int, mesh: Mesh) -> Splits:
    """The layout of a result under a strategy."""
    partial, side = {axis: "sum" for axis, _ in strategy.passes}, shape.results[result]
    complete = _complete(shape, strategy, side)
    sent_over = *exchange.exchanged(shape, strategy), *_round(shape, strategy)
    for factor, op in shape.reduced_in[result].items():
        if factor not in complete:
            partial |= {axis: op for axis in map(axis_of, strategy.split[factor]) if axis not in sent_over}
    return _splits(shape, side, strategy, partial, mesh)


def _round(shape: Shape, strategy: Strategy) -> tuple[str, ...]:
    """The axis of a ring over factors that are not parted, if there is one."""
    circle = rings.circle_of(shape, strategy)
    return () if circle is None else (circle.axis,)


def _complete(shape: Shape, strategy: Strategy, side: Side) -> set[int]:
    """The factors over which a variant completes a result, because it splits them together with one that it has."""
    groups = shape.groups.get(strategy.variant, ())
    return {factor for group in groups if not side.carried.isdisjoint(group) for factor in group}


def _splits(shape: Shape, side: Side, strategy: Strategy, partial: dict[str, str], mesh: Mesh) -> Splits:
    split = split_of(shape, strategy, side.carried)
    axes = tuple([() if factor is None else split[factor] for factor in side.factors])
    return Splits(axes, tuple([(a, partial[a]) for a in mesh.names if a in partial]) if partial else ())
