"""An operator with the strategy that was chosen for it: what a lowered program knows of it, and invariants ask."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from shardc.ir.facts import FACTS, Lowered
from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh
from shardc.ir.splits import Splits
from shardc.rules.factors.factored import Op, Value
from shardc.rules.factors.rings import circle_of, part_of_ring
from shardc.rules.factors.strategy import PLAIN, Shape, Side, Strategy, demand, make, split_of
from shardc.runtime.kernels.parts import Part
from shardc.runtime.mesh.orders import axis_of


@dataclass(frozen=True, slots=True)
class Chosen:
    """An operator with the strategy that was chosen for it: what `reshard` knows of a node that it writes."""

    op: Op
    shape: Shape
    strategy: Strategy

    @property
    def alike(self) -> Hashable:
        """What operators of equal layers have in common that have one strategy."""
        return self.op.kind, self.strategy

    def operand_layouts(self, mesh: Mesh) -> list[Layout]:
        """Per tensor operand the layout that it must have."""
        sides = zip(self.op.operands, self.shape.operands, strict=True)
        return [
            self._layout(operand.value, side, demand(self.shape, self.strategy, index, mesh))
            for index, (operand, side) in enumerate(sides)
        ]

    def result_layouts(self, mesh: Mesh) -> dict[int, Layout]:
        """Per result the layout that it has."""
        sides = zip(self.op.results, self.shape.results, strict=True)
        return {
            result.key[1]: self._layout(result.value, side, make(self.shape, self.strategy, index, mesh))
            for index, (result, side) in enumerate(sides)
        }

    def _layout(self, value: Value, side: Side, splits: Splits) -> Layout:
        """The layout of a value whose base value lies as `splits`; of a dim that a view expands, only factors tell."""
        split = split_of(self.shape, self.strategy, side.carried)
        axes_of_atoms = [
            splits.axes[base] if base is not None else () if factor is None else split[factor]
            for base, factor in side.leaves
        ]
        return value.form.layout(axes_of_atoms, splits.partial)

    def sums(self, axis: str, operands: frozenset[int]) -> bool:
        """Whether it may read just these operands as addends over an axis: they are a linear group, or those that the
        axis makes sums of parts, as it splits a factor of the others."""
        split = {factor for factor, axes in enumerate(self.strategy.split) if axis in map(axis_of, axes)}
        parts = frozenset(index for index, factors in enumerate(self.shape.addends) if factors & split)
        return operands in self.shape.linear or operands == parts

    def parts(self) -> dict[str, Part]:
        """The parted factors that the strategy splits, as their body gets them."""
        parts: dict[str, Part] = {}
        for factor, axes in zip(self.op.factors, self.strategy.split, strict=True):
            if factor.parting is not None and axes:
                size, window = factor.parting.size, factor.parting.parts is not None
                parts[factor.name] = Part(axes, size, 1 if window else size // factor.size)
        return parts

    @property
    def is_itself(self) -> bool:
        """Whether the operator itself runs, and no body."""
        return self.strategy.variant == PLAIN

    def runs(self, mesh: Mesh) -> tuple[Any, Mapping[str, Part | int]]:
        """What a rank runs in its place: the body of the variant where parted factors are split, or something goes
        round, told of the parts."""
        circle = circle_of(self.shape, self.strategy)
        if circle is not None:
            name, part, outer = part_of_ring(self.shape, self.strategy, circle, mesh)
            told = {name: part, "outer": outer} if outer > 1 else {name: part}
            return self.op.rule.variant(self.strategy.variant).body, told
        parts = self.parts()
        return (self.op.rule.variant(self.strategy.variant).body if parts else self.op.node.target), parts


def chosen_of(node: fx.Node) -> Chosen | None:
    """The operator of a lowered node, with its strategy; None for conversions, views and results taken out."""
    facts = node.meta.get(FACTS)
    return cast("Chosen | None", facts.operator) if isinstance(facts, Lowered) else None
