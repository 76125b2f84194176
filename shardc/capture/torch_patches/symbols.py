"""Symbolic sizes of one trace: torch's ShapeEnv, asked whether its guards hold at other sizes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.printers import PythonPrinter  # how torch itself writes its guards as code

from shardc.capture.user_frames import caller_is_users
from shardc.errors import CaptureError

_NUMBERS: dict[type, type] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}


def is_symbolic(value: Any) -> bool:
    """Whether a number depends on a symbol."""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def number_of(value: Any) -> int | float | bool:
    """A symbolic number as that of this call, to which that fixes the trace."""
    return _NUMBERS[type(value)](value)


@contextmanager
def spelled_out() -> Generator[None]:
    """In here, where code of the user's makes a text of a symbolic number, the trace fixes the number to that of this
    call: f"{x.shape[0]}x8" is "6x8", and never "s0x8"."""

    def spelling(original: Callable[[Any], str]) -> Callable[[Any], str]:
        def spelled(value: Any) -> str:
            return str(number_of(value)) if caller_is_users(sys._getframe(1)) else original(value)

        return spelled

    with ExitStack() as stack:
        kind: Any
        for kind in _NUMBERS:
            stack.enter_context(patch.object(kind, "__repr__", spelling(kind.__repr__)))
        yield


class Free(NamedTuple):
    """A named size that may be chosen: it is `step` times an integer, plus `offset`."""

    name: str
    step: int
    offset: int


class Symbols:
    """Named sizes of one trace, and what the trace assumed of them (torch's guards).

    torch checks guards against the inputs of a call; here they are checked against sizes alone, before there is a call.
    For that, the ShapeEnv is asked for its guards, ranges and replacements, which are private. `fixed` are the names
    whose size the trace fixed; the sizes `free` determine all others.

    Raises CaptureError where a symbol is no linear function of one of the named sizes.
    """

    def __init__(self, sizes: Mapping[str, torch.SymInt]) -> None:
        self._env: ShapeEnv = next(iter(sizes.values())).node.shape_env
        self._named = {name: self._env.replace(size.node.expr) for name, size in sizes.items()}
        self.fixed = {name: int(expr) for name, expr in self._named.items() if not expr.free_symbols}
        self.free: dict[sympy.Symbol, Free] = {}
        for symbol in sorted({s for expr in self._named.values() for s in expr.free_symbols}, key=str):
            self.free[symbol] = self._determining(symbol)
        self._roots: Callable[[Mapping[str, int]], Sequence[int]] = self._lambda("sizes", self._root_codes())
        self._conditions: Callable[..., Sequence[bool]] = self._lambda(
            ", ".join(["sizes", *map(str, self.free)]), self._condition_codes()
        )
        self._sizes: Callable[..., Sequence[int]] = self._lambda(
            ", ".join(map(str, self.free)), [_code(expr) for expr in self._named.values()]
        )

    def _determining(self, symbol: sympy.Symbol) -> Free:
        """The named size from which the symbol follows."""
        for name, expr in self._named.items():
            if expr.free_symbols == {symbol}:
                step, offset = expr.coeff(symbol, 1), expr.coeff(symbol, 0)
                if step.is_Integer and step > 0 and offset.is_Integer and expr == step * symbol + offset:
                    return Free(name, int(step), int(offset))
        raise CaptureError(f"no dynamic size determines {symbol}, on which {', '.join(self._named)} depend")

    def _root_codes(self) -> list[str]:
        return [f"(sizes[{one.name!r}] - {one.offset}) // {one.step}" for one in self.free.values()]

    def _condition_codes(self) -> list[str]:
        codes = [f"sizes[{name!r}] == {_code(expr)}" for name, expr in self._named.items()]
        guards = {self._env.replace(guard.expr) for guard in self._env.guards}
        for guard in guards - {sympy.true}:  # one on a symbol of its own, such as a stride, is never known to hold
            codes.append(_code(guard) if guard.free_symbols <= self.free.keys() else "False")
        for symbol in self.free:
            bounds = self._env.var_to_range.get(symbol)
            if bounds is not None and bounds.lower.is_Integer:
                codes.append(f"{symbol} >= {bounds.lower}")
            if bounds is not None and bounds.upper.is_Integer:
                codes.append(f"{symbol} <= {bounds.upper}")
        return codes

    def _lambda(self, arguments: str, results: Sequence[str]) -> Callable[..., Any]:
        space = {"math": math, "torch": torch}
        return eval(f"lambda {arguments}: ({''.join(f'{one}, ' for one in results)})", space)

    def hold(self, sizes: Mapping[str, int]) -> bool:
        """Whether every guard holds at these sizes."""
        return all(self._conditions(sizes, *self._roots(sizes)))

    def sizes_at(self, free: Mapping[str, int]) -> dict[str, int] | None:
        """All sizes, from those that may be chosen, by name. None where a guard does not hold."""
        sizes = dict(zip(self._named, self._sizes(*self._roots(free)), strict=True))
        return sizes if all(sizes[name] == size for name, size in free.items()) and self.hold(sizes) else None

    def evaluator(self, sizes: Mapping[str, int]) -> Callable[[Any], Any]:
        """A function that puts the sizes' numbers into a symbolic number, and leaves all else alone."""
        values = dict(zip(self.free, map(sympy.Integer, self._roots(sizes)), strict=True))
        known: dict[sympy.Basic, Any] = {}

        def number(value: Any) -> Any:
            if not is_symbolic(value):
                return value
            expr = value.node.expr
            if expr not in known:
                known[expr] = self._env.replace(expr).xreplace(values)
            return _NUMBERS[type(value)](known[expr])

        return number


def _code(expr: Any) -> str:
    return PythonPrinter().doprint(expr)  # type: ignore[no-any-return]
