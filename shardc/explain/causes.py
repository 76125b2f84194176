"""Why conversions stand in a program: what is converted, from which layout to which, and who reads it."""

from __future__ import annotations

import operator
from functools import cached_property

from torch import fx

from shardc.ir.facts import Key, laid, lowered
from shardc.ir.program import Role, name_of
from shardc.planning.compilation import Compilation
from shardc.rules.factors.chosen import Chosen, chosen_of
from shardc.rules.factors.strategy import PLAIN


class Causes:
    """Tells causes in a compilation that was lowered. Equal layers have equal causes, but for numbers in paths."""

    def __init__(self, c: Compilation) -> None:
        self.mesh, self.program, self.values = c.mesh, c.program, c.factored.values

    def of_step(self, node: fx.Node) -> str:
        """Of a step of a conversion: `gradient of lm_head.weight, f32[8, 4] +sum@dp to f32[8@dp, 4], for view`."""
        base = lowered(node).base
        assert base is not None
        source = node.args[0][0] if isinstance(node.args[0], (list, tuple)) else node.args[0]
        members = len(lowered(node).members)
        result = next((user for user in node.users if user.target is operator.getitem), node) if members else node
        assert isinstance(source, fx.Node)
        before, after = (laid(one).simplify(self.mesh) if lowered(one).layout else "" for one in (source, result))
        more = f" and {members - 1} more" if members > 1 else ""
        change = f"{before} to {after}" if after else str(before)
        reader = _reader(node)
        return f"{self._named(base)}{more}, {change}{f', for {reader}' if reader else ''}"

    def of_body(self, chosen: Chosen) -> str:
        """Of a collective in the body of an operator: `inside attention (ring)`."""
        variant = chosen.strategy.variant
        several = variant != PLAIN and len(chosen.op.rule.variants) > 1
        return f"inside {name_of(chosen.op.node.target)}{f' ({variant})' if several else ''}"

    def _named(self, key: Key) -> str:
        return self._ports.get(key) or f"result of {name_of(key[0].target)}"

    @cached_property
    def _ports(self) -> dict[Key, str]:
        """The values that the user has a name for."""
        named: dict[Key, str] = {}
        for port, node in zip(self.program.outputs, self.program.results, strict=True):
            if node is not None:
                gradient = port.role is Role.GRADIENT
                named[self.values[node].key] = f"gradient of {port.name}" if gradient else f"{port.role} {port.name}"
        for port, node in zip(self.program.inputs, self.program.placeholders, strict=True):
            named[node, 0] = port.name or f"{port.role} {port.index}"
        return named


def _reader(node: fx.Node) -> str:
    """The first operator that reads the result of a step, past views and further steps; "" where the step is the last,
    and its result an output."""
    seen, stack = set[fx.Node](), [node]
    while stack:
        for user in stack.pop(0).users:
            chosen = chosen_of(user) if user.op != "output" else None
            if chosen is not None:
                return name_of(chosen.op.node.target)
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return ""
