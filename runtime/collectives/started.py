"""Collectives that go on while the rank computes.

    s = all_reduce.start(g, axis="dp")     as soon as the operand is made
    ...                                    what the rank computes meanwhile
    r = wait(s)                            where the result is first read

Called without `start`, a collective is started and awaited at once. Every rank starts the same ones in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, ParamSpec, TypeVar

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Started(Generic[Result]):
    """A collective under way. `land` waits for it and gives its result; it is called once."""

    land: Callable[[], Result]


def wait(started: Started[Result]) -> Result:
    """The result of a collective that was started."""
    return started.land()


def done(result: Result) -> Started[Result]:
    """What there is nothing to wait for."""
    return Started(lambda: result)


class Collective(Generic[Arguments, Result]):
    """A collective as generated code calls it: run to its end, or only started."""

    def __init__(self, begin: Callable[Arguments, Started[Result]]) -> None:
        self._begin = begin
        self.__name__: str = begin.__name__
        functools.update_wrapper(self, begin)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return self._begin(*args, **kwargs).land()

    def start(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Started[Result]:
        """Start it, with the arguments of a call; `wait` gives the result."""
        return self._begin(*args, **kwargs)
