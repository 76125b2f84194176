"""Which matrix products are offered rings: those whose collective nothing else would hide.

forward     gate = mm(x, w)     no ring in which w goes round is offered: w is gathered while the layer before computes
backward    dw = mm(xt, dy)     nor one of its sums: gradients are reduced beside the rest of backward
"""

from __future__ import annotations

from collections import defaultdict

from shardc.ir.program import Role
from shardc.rules.factors.factored import Factored, Key, Op
from shardc.rules.factors.strategy import Shape
from shardc.rules.ring import Ring


class RingOffers:
    """Of one program, the values that are made of parameters alone, and those of which only gradients are made."""

    def __init__(self, factored: Factored) -> None:
        program = factored.program
        parameters = {
            node for node, port in zip(program.placeholders, program.inputs, strict=True) if port.role is Role.PARAMETER
        }
        self.weights: set[Key] = set()
        readers: dict[Key, list[Op | None]] = defaultdict(list)  # None: an output that is no gradient
        ends: set[Key] = set()
        for op in factored.ops:
            keys = [operand.value.key for operand in op.operands]
            if op.node in parameters or (keys and self.weights.issuperset(keys)):
                self.weights.update(result.key for result in op.results)
            for key in keys:
                readers[key].append(op)
        for port, node in zip(program.outputs, program.results, strict=True):
            if node is not None:
                key = factored.values[node].key
                readers[key] += [None] if port.role is not Role.GRADIENT else []
                ends.add(key)
        self.gradients: set[Key] = set()
        for op in reversed(factored.ops):
            for result in op.results:
                reading = readers[result.key]
                if (reading or result.key in ends) and all(one is not None and self._ends(one) for one in reading):
                    self.gradients.add(result.key)

    def _ends(self, op: Op) -> bool:
        return all(result.key in self.gradients for result in op.results)

    def offered(self, op: Op, shape: Shape) -> frozenset[str]:
        """The variants with rings that are offered to an operator of this shape."""
        return frozenset(v.name for v in shape.variants if v.ring is not None and not self._hides_anyway(op, v.ring))

    def _hides_anyway(self, op: Op, ring: Ring) -> bool:
        if ring.operand is None:
            return op.results[0].key in self.gradients
        return op.operands[ring.operand].value.key in self.weights
