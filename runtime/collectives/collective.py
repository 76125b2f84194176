"""What a collective is: one object that knows its transports, result shape, bytes sent, workspace and costs.

    all_reduce(g, axis="dp")                   generated code calls it: it is started and awaited at once
    s = all_reduce.start(g, axis="dp")         or starts it as soon as the operand is made
    ...                                        what the rank computes meanwhile
    r = wait(s)                                where the result is first read
    all_reduce.sent(8, 1024)                   the planner asks it for the bytes that a rank sends

Every rank starts the same collectives in the same order. `dim` is a tensor's dim, `axis` a mesh axis with n ranks. A
collective looks up the running rank itself, so the code is the same on every rank. All results are contiguous.

To add a collective, write its module here, with the function in `__all__`, and add its formulas to the table in
`shardc/cost/collectives.py`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, TypeVar

from torch import Tensor

from shardc.runtime.collectives.c10d import Group
from shardc.runtime.errors import RankError
from shardc.runtime.mesh.orders import BLOCKS

if TYPE_CHECKING:
    from shardc.runtime.collectives.bucket import Bucket

__all__ = ["wait"]

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
Sizes = tuple[int, ...]
"""The shape of a tensor."""


@dataclass
class Started(Generic[Result]):
    """A collective under way. `land` waits for it and returns its result; call it once."""

    land: Callable[[], Result]


def wait(started: Started[Result]) -> Result:
    """The result of a collective that was started, which holds nothing from then on."""
    land, started.land = started.land, _landed
    return land()


def _landed() -> NoReturn:
    raise RankError("a collective was awaited twice: keep the result of the first wait")


def done(result: Result) -> Started[Result]:
    """A collective that is over already: there is nothing to wait for."""
    return Started(lambda: result)


class Held(Enum):
    """What a collective holds while it is under way, besides the memory of its result."""

    NOTHING = "nothing"
    OPERAND = "operand"
    COPY = "copy"
    """A rearranged copy of the operand, which is what is sent."""


class Collective(ABC, Generic[Arguments, Result]):
    """A collective: the function that generated code calls, and the facts that the planner and the meshes need.

    Decorates the function that starts it. In all methods, `ranks` is the number n of ranks on the axis, and `keywords`
    are the keyword arguments of a call. Sizes are bytes.
    """

    local = False
    """Whether it is local: it sends nothing."""
    works_on_copy = False
    """Whether it copies its operand into the result at the start, and so need not hold the operand."""
    writes_operand = False
    """Whether its transport may write to its operand, which nobody else reads then."""
    uneven = False
    """Whether ranks send different amounts. `op` then differs too, and `exchange` gets all of them, joined by `;`."""
    keeps_part = False
    """Whether it reads only the chunk of its operand that it keeps."""
    bucket: Bucket[..., Any] | None = None
    """The bucket that runs several calls of this collective as one; None if there is none."""

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

    def __reduce__(self) -> str:  # copied and pickled by name, because collectives are compared by identity
        return self.name

    @property
    def single(self) -> AnyCollective:
        """The collective that is priced: that of the members if this one is a bucket, the even one if ranks send
        different amounts, else itself."""
        return self

    @abstractmethod
    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        """The virtual transport: the result of the rank at `position`, from the operands of all ranks of the axis.

        Operands are in the order of the ranks. `op` is that of `Context.start`.
        """

    @abstractmethod
    def c10d(self, operand: Tensor, group: Group, op: str) -> Callable[[], Tensor]:
        """Start torch's functional collective on a group. The returned function waits for it and returns its result."""

    @abstractmethod
    def sent(self, ranks: int, size: float) -> float:
        """Bytes that one rank sends if its local operand has `size` bytes (if it is `uneven`: where all send alike).

        This is the least that any algorithm sends for a long operand (docs/design/costs.md), whatever the backend does.
        """

    def counted(self, ranks: int, position: int, operand: Tensor, op: str) -> float:
        """Bytes that the rank at `position` of its axis sends in one call. Those of `sent`, unless it is `uneven`."""
        return self.sent(ranks, operand.numel() * operand.element_size())

    @abstractmethod
    def shape(self, shape: Sizes, ranks: int, keywords: Mapping[str, Any]) -> Sizes:
        """The shape of the result of a call whose operand has `shape`."""

    def padded(self, shape: Sizes, ranks: int, keywords: Mapping[str, Any]) -> Sizes:
        """The shape of the tensor that is sent: the operand, padded to whole chunks."""
        return shape

    def result_bytes(self, ranks: int, size: float) -> float:
        """Bytes of the result if the operand has `size` bytes and nothing is padded."""
        return size

    def holds(self, keywords: Mapping[str, Any]) -> Held:
        """The memory that it holds while it is under way."""
        return Held.NOTHING if self.works_on_copy else Held.OPERAND

    def joins(self, keywords: Mapping[str, Any]) -> bool:
        """Whether it copies what arrives into new memory, because chunks go side by side along another dim than 0."""
        return False

    def workspace(self, keywords: Mapping[str, Any], operand: int, result: int, started: bool) -> int:
        """Bytes that it allocates and frees again while it runs.

        `operand` and `result` are the bytes of their storages (for a bucket, of all its operands together). With
        `started`, only what it frees before it is under way counts, not what it `holds`.
        """
        return 0

    def dims(self, source: int | None, target: int | None) -> dict[str, int]:
        """The keywords of a call that moves the axis from dim `source` to dim `target`; either may be None."""
        dim = target if source is None else source
        return {} if dim is None else {"dim": dim}

    def orders(self, source: str, target: str) -> dict[str, str]:
        """The keywords that tell a call in which order the axis dealt out the dim that it leaves, and in which order it
        deals out the dim that it comes to; none where both are blocks."""
        order = next((one for one in (source, target) if one != BLOCKS), None)
        return {} if order is None else {"order": order}

    def sample(self, ranks: int, near: int = 1) -> dict[str, Any]:
        """Keywords, other than the axis, of the call that `shardc calibrate` times.

        Its operand is a vector whose length n divides. Where a keyword decides how far data goes, it goes at least
        `near` ranks on.
        """
        return {}


AnyCollective = Collective[..., Any]


class Local(Collective[Arguments, Result]):
    """A step that sends nothing: every rank computes its result from its own operand."""

    local = True

    def exchange(self, operands: Sequence[Tensor], position: int, op: str) -> Tensor:
        raise RankError(f"{self.name} is local: nothing is sent")

    def c10d(self, operand: Tensor, group: Group, op: str) -> Callable[[], Tensor]:
        raise RankError(f"{self.name} is local: nothing is sent")

    def sent(self, ranks: int, size: float) -> float:
        return 0.0
