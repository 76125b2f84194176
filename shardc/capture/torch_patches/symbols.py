"""Symbolic sizes of one trace: torch's ShapeEnv, asked whether its guards hold at other sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def is_symbolic(value: Any) -> bool:
    """Whether a number depends on a symbol."""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


class Symbols:
    """Named sizes of one trace, and what the trace assumed of them (torch's guards).

    torch checks guards against the inputs of a call; here they are checked against sizes alone, before there is a call.
    For that, the ShapeEnv is asked for its guards, ranges and replacements, which are private.
    """

    def __init__(self, sizes: Mapping[str, torch.SymInt]) -> None:
        self._env: ShapeEnv = next(iter(sizes.values())).node.shape_env
        self._named = {name: self._env.replace(size.node.expr) for name, size in sizes.items()}
        self.fixed = {name: int(expr) for name, expr in self._named.items() if not expr.free_symbols}

    def hold(self, sizes: Mapping[str, int]) -> bool:
        """Whether every guard holds at these sizes."""
        values = self._values(sizes)
        if values is None:
            return False
        guards = [self._env.replace(guard.expr).xreplace(values) for guard in self._env.guards]
        ranges = self._env.var_to_range
        inside = all(ranges[s].lower <= n <= ranges[s].upper for s, n in values.items() if s in ranges)
        return inside and all(guard == sympy.true for guard in guards)

    def _values(self, sizes: Mapping[str, int]) -> dict[sympy.Symbol, sympy.Integer] | None:
        """The symbols' values; None where no integers give these sizes."""
        symbols = sorted({s for expr in self._named.values() for s in expr.free_symbols}, key=str)
        equations = [expr - sizes[name] for name, expr in self._named.items()]
        solved = sympy.solve(equations, symbols, dict=True)
        if len(solved) != 1 or not all(isinstance(solved[0].get(s), sympy.Integer) for s in symbols):
            return None
        return solved[0]

    def evaluator(self, sizes: Mapping[str, int]) -> Callable[[Any], Any]:
        """A function that puts the sizes' numbers into a symbolic number, and leaves all else alone."""
        values = self._values(sizes)
        assert values is not None
        known: dict[sympy.Basic, Any] = {}

        def number(value: Any) -> Any:
            if not is_symbolic(value):
                return value
            expr = value.node.expr
            if expr not in known:
                known[expr] = self._env.replace(expr).xreplace(values)
            kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]
            return kind(known[expr])

        return number
