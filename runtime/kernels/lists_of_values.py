"""Lists of values that a loop reads run by run, and lets go of."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["take"]

Value = TypeVar("Value")


def take(values: list[Value], count: int) -> list[Value]:
    """The last `count` values of a list, in order; the list loses them, so that whoever takes them may free them."""
    start = len(values) - count
    taken = values[start:]
    del values[start:]
    return taken
