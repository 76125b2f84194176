"""The layouts that the ports of a program may have.

parameter    f32[64@dp, 32]    what a DTensor can store
input        f32[64@dp, 32]    what local slices of the global tensor give
"""

from __future__ import annotations

from collections.abc import Callable

from shardc.ir.layout import Layout, is_sliceable, is_storable
from shardc.ir.mesh import Mesh
from shardc.ir.splits import Splits
from shardc.rules.factors.factored import Value

Accepts = Callable[[Splits], bool]


class PortLayouts:
    """Tests of layouts on one mesh; each is made once for all values of one form."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._answers: dict[object, bool] = {}

    def storable(self, value: Value) -> Accepts:
        """Accepts what a DTensor can store: one chunk of every dim, axes in an order that DTensor has, nothing
        partial."""

        def stored(splits: Splits, layout: Layout) -> bool:
            return not splits.partial and is_storable(layout, self.mesh)

        return self._remembered("stored", value, stored)

    def sliceable(self, value: Value) -> Accepts:
        """Accepts what local slices of the global tensor give, for inputs of a generated module."""

        def sliced(_: Splits, layout: Layout) -> bool:
            return is_sliceable(layout, self.mesh)

        return self._remembered("sliced", value, sliced)

    def _remembered(self, question: str, value: Value, answer: Callable[[Splits, Layout], bool]) -> Accepts:
        """Accepts as `answer` does, which is asked once for all values of one form."""

        def test(splits: Splits) -> bool:
            key = question, value.form, splits
            if key not in self._answers:
                self._answers[key] = answer(splits, value.form.layout_on(splits.axes))
            return self._answers[key]

        return test
