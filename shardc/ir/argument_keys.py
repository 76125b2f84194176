"""Arguments of calls as keys: what is known of operands is in them, in place of the operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def key_of(argument: Any, of_operand: Callable[[fx.Node], Any]) -> Any:
    """An argument as a key, an operand by what `of_operand` says of it; numbers of different types are different."""
    if isinstance(argument, fx.Node):
        return of_operand(argument)
    if isinstance(argument, (list, tuple)):
        return "list", *(key_of(item, of_operand) for item in argument)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(argument, dict):
        return "dict", *((name, key_of(item, of_operand)) for name, item in argument.items())  # pyright: ignore[reportUnknownVariableType]
    return "plain", type(argument), argument  # pyright: ignore[reportUnknownVariableType]
