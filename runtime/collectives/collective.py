"""What a collective is: one object that owns all there is to know about it.

    all_reduce(g, axis="dp")                   generated code calls it: it is started and awaited at once
    s = all_reduce.start(g, axis="dp")         or starts it as soon as the operand is made
    ...                                        what the rank computes meanwhile
    r = wait(s)                                where the result is first read
    all_reduce.sent(8, 1024)                   the planner asks it for the bytes that a rank sends

Every rank starts the same ones in the same order. `dim` is a tensor's dim, `axis` a mesh axis with n ranks. Each finds
the running rank by itself, so the code is the same on every rank. All results are contiguous.

To add a collective: write its module here, with the function in `__all__`, and its formulas into the table of
`shardc/cost/collectives.py`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from torch import Tensor

from shardc.runtime.collectives.c10d import Group
from shardc.runtime.errors import RankError

if TYPE_CHECKING:
    from shardc.runtime.collectives.bucket import Bucket

__all__ = ["wait"]

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
Sizes = tuple[int, ...]
"""The shape of a tensor."""


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


class Held(Enum):
    """What a collective holds while it is under way, besides the memory of its result."""

    NOTHING = "nothing"
    OPERAND = "operand"
    COPY = "copy"
    """A rearranged copy of the operand, which is what is sent."""


class Collective(ABC, Generic[Arguments, Result]):
    """A collective: the function that generated code calls, and what the planner and the meshes ask about it.

    Decorates the function that starts it. In all methods `ways` is the number n of ranks on the axis, `told` the
    keyword arguments of a call. Sizes are bytes.
    """

    local = False
    """Whether it sends nothing."""
    works_on_copy = False
    """Whether it copies its operand into the result at the start, so that it need not hold the operand."""
    keeps_part = False
    """Whether it reads only the chunk of its operand that it keeps."""
    bucket: Bucket[..., Any] | None = None
    """What runs several of this one as one; None where there is nothing that does."""

    def __init__(self, begin: Callable[Arguments, Started[Result]]) -> None:
        self._begin = begin
        self.name: str = begin.__name__
        self.__name__: str = begin.__name__
        functools.update_wrapper(self, begin)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return self._begin(*args, **kwargs).land()

    def start(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Started[Result]:
        """Start it, with the arguments of a call; `wait` gives the result."""
        return self._begin(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<collective {self.name}>"

    def __reduce__(self) -> str:  # copied and pickled by name: it is told by identity
        return self.name

    @property
    def single(self) -> AnyCollective:
        """The collective that runs, over a buffer where this one is a bucket: it tells what this one costs."""
        return self

    @abstractmethod
    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        """The virtual transport: from what all ranks of the axis brought, in order, what the rank at `position` gets.
        `op` is what `Context.start` was given."""

    @abstractmethod
    def c10d(self, operand: Tensor, group: Group, op: str) -> Callable[[], Tensor]:
        """Start torch's functional collective on a group; what is returned waits for it and gives what arrives."""

    @abstractmethod
    def sent(self, ways: int, size: float) -> float:
        """Bytes that one rank sends if its local operand has `size`: the least that any algorithm can do with an
        operand too long for its latency to matter, whatever the backend does."""

    @abstractmethod
    def shape(self, shape: Sizes, ways: int, told: Mapping[str, Any]) -> Sizes:
        """The shape of the result of a call whose operand has `shape`."""

    def padded(self, shape: Sizes, ways: int, told: Mapping[str, Any]) -> Sizes:
        """The shape of what is sent: that of the operand, padded to whole chunks."""
        return shape

    def result_bytes(self, ways: int, size: float) -> float:
        """Bytes of the result of an operand of `size`, where nothing is padded."""
        return size

    def holds(self, told: Mapping[str, Any]) -> Held:
        """What it holds while it is under way."""
        return Held.NOTHING if self.works_on_copy else Held.OPERAND

    def joins(self, told: Mapping[str, Any]) -> bool:
        """Whether what arrives is put side by side along another dim than the first, into new memory."""
        return False

    def workspace(self, told: Mapping[str, Any], operand: int, result: int, started: bool) -> int:
        """Bytes that it allocates and frees again while it runs, where `operand` and `result` are the bytes of the
        storages of both (of a bucket, of all of its operands); of one that is `started`, while it starts: what it
        `holds` is not counted again."""
        return 0

    def dims(self, source: int | None, target: int | None) -> dict[str, int]:
        """The keywords of a call that takes the axis from dim `source` and puts it on `target`; either may be None."""
        dim = target if source is None else source
        return {} if dim is None else {"dim": dim}

    def sample(self, ways: int, near: int = 1) -> dict[str, Any]:
        """Keywords, besides the axis, of a call on a vector whose length n divides, by which it is timed; it is to
        move everything at least `near` ranks on, where that can be told."""
        return {}


AnyCollective = Collective[..., Any]


class Local(Collective[Arguments, Result]):
    """A step that sends nothing: every rank makes its result from what it has."""

    local = True

    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        raise RankError(f"{self.name} is local: nothing is sent")

    def c10d(self, operand: Tensor, group: Group, op: str) -> Callable[[], Tensor]:
        raise RankError(f"{self.name} is local: nothing is sent")

    def sent(self, ways: int, size: float) -> float:
        return 0.0
