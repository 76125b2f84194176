"""The mesh as generated code meets it: named axes, the running rank, and the four collectives of an axis."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from shardc.runtime.collectives.started import Started
from shardc.runtime.errors import RankError, rank_error

Result = TypeVar("Result")

_running = threading.local()


class RuntimeMesh(ABC):
    """Named axes and the ranks on them, numbered row-major: the first axis is the slowest.

    `axes` maps names to sizes; `ranks` are those that run in this process; `traffic` is the bytes that one rank has
    sent since the last `reset`, per axis. With n ranks on the axis and B bytes in the local operand: all-gather
    (n-1)*B, reduce-scatter and all-to-all (n-1)/n*B, all-reduce 2*(n-1)/n*B, permute B.
    """

    def __init__(self, axes: Mapping[str, int]) -> None:
        for name, size in axes.items():
            if size < 1:
                raise RankError(f"mesh axis {name!r} must have at least one rank, not {size}")
        self.axes: dict[str, int] = dict(axes)
        self.size: int = math.prod(self.axes.values())
        self.ranks: tuple[int, ...] = tuple(range(self.size))
        self.traffic: dict[str, float] = dict.fromkeys(self.axes, 0.0)

    def reset(self) -> None:
        """Set `traffic` to zero."""
        self.traffic = dict.fromkeys(self.axes, 0.0)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` stands on each axis."""
        result: dict[str, int] = {}
        for name, size in reversed(self.axes.items()):
            rank, result[name] = divmod(rank, size)
        return {name: result[name] for name in self.axes}

    @abstractmethod
    def device(self, rank: int) -> torch.device:
        """The device that holds the tensors of `rank`."""

    @abstractmethod
    def run(
        self, function: Callable[..., Result], arguments: Callable[[int], tuple[Any, ...]], *, random: bool = False
    ) -> list[Result]:
        """Call `function(*arguments(rank))` on every local rank; the results, in the order of `ranks`.

        Runs without recording gradients. With `random`, every rank draws from its own copy of torch's default CPU
        generator (under torch.distributed: rank 0's), and the default generator is left in the state after the draws.
        A failure on any rank raises one RankError.
        """

    @abstractmethod
    def begin(self, context: Context, collective: str, axis: str, operand: Tensor, op: str) -> Callable[[], Tensor]:
        """Start the transport of one collective, for `shardc.runtime.collectives`; what is returned waits for its end
        and gives the result.

        With n ranks on the axis: "all_gather" takes any shape and gives `(n, *shape)`, "reduce_scatter" takes
        `(n, *chunk)` and gives `chunk`, "all_to_all" takes and gives `(n, *chunk)`, "all_reduce" keeps the shape, and
        "permute" gives the operand of the rank whose coordinate `op` names at the own one, as in "1 2 0".
        """

    def agreed(self, source: str) -> str:
        """What all processes take for `source`: that of the first."""
        return source

    def count(self, collective: str, axis: str, operand: Tensor) -> None:
        """Add to `traffic` what one rank sends in this collective."""
        n, size = self.axes[axis], operand.numel() * operand.element_size()
        steps = {"all_gather": (n - 1) * size, "all_reduce": 2 * (n - 1) * size / n, "permute": size}
        self.traffic[axis] += steps.get(collective, (n - 1) * size / n)


class Context:
    """The running rank: its mesh, coordinates and device, the run's random generator (None where the run draws
    nothing), and `operation`, the (collective, axis) under way, for messages."""

    def __init__(self, mesh: RuntimeMesh, rank: int, state: Tensor | None) -> None:
        self.mesh = mesh
        self.rank = rank
        self.coordinates: dict[str, int] = mesh.coordinates(rank)
        self.device: torch.device = mesh.device(rank)
        self.operation: tuple[str, str] | None = None
        self.generator: torch.Generator | None = None
        if state is not None:
            self.generator = torch.Generator()
            self.generator.set_state(state)

    def size(self, axis: str) -> int:
        """The number of ranks on `axis`; RankError where the mesh has no such axis."""
        if axis not in self.mesh.axes:
            raise RankError(f"the mesh has no axis {axis!r}, only {', '.join(self.mesh.axes)}")
        return self.mesh.axes[axis]

    @overload
    def start(self, name: str, axis: str, operand: Tensor, *, op: str = "") -> Started[Tensor]: ...
    @overload
    def start(
        self, name: str, axis: str, operand: Tensor, finish: Callable[[Tensor], Result], op: str = ""
    ) -> Started[Result]: ...
    def start(
        self, name: str, axis: str, operand: Tensor, finish: Callable[[Tensor], Any] = lambda moved: moved, op: str = ""
    ) -> Started[Any]:
        """Start one collective (see `Mesh.begin`) and count its bytes; it gives what `finish` makes of what arrives."""
        self.operation = (name, axis)
        if self.rank == self.mesh.ranks[0]:
            self.mesh.count(name, axis, operand)
        operand = operand.contiguous()
        arrive = self.mesh.begin(self, name, axis, operand, op)
        self.operation = None
        # an all-reduce works on a copy; the others read their operand until they end
        held = [] if name == "all_reduce" else [operand]

        def land() -> Any:
            self.operation = (name, axis)
            moved = arrive()
            self.operation = None
            held.clear()
            return finish(moved)

        return Started(land)

    def call(self, function: Callable[..., Result], arguments: Callable[[int], tuple[Any, ...]]) -> Result:
        """`function(*arguments(rank))` with this context as the running one; every exception becomes a RankError."""
        try:
            with entered(self), torch.no_grad():
                return function(*arguments(self.rank))
        except Exception as error:
            raise rank_error(error, self.rank, self.coordinates, self.operation) from error


def current() -> Context:
    """The rank that runs in this thread; RankError outside of `Mesh.run`."""
    context: Context | None = getattr(_running, "context", None)
    if context is None:
        raise RankError("no rank is running in this thread: generated code runs inside Mesh.run or an Executable")
    return context


@contextmanager
def entered(context: Context) -> Generator[None]:
    """Make `context` the running rank of this thread."""
    before = getattr(_running, "context", None)
    _running.context = context
    try:
        yield
    finally:
        _running.context = before
