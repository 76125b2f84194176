"""The mesh as generated code meets it: named axes, the running rank, and how its collectives start."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from shardc.runtime.collectives.collective import AnyCollective, Started
from shardc.runtime.errors import RankError, rank_error

Result = TypeVar("Result")

_running = threading.local()


class RuntimeMesh(ABC):
    """Named axes and the ranks on them, numbered row-major: the first axis is the slowest.

    `axes` maps names to sizes; `ranks` are those that run in this process; `traffic` is the bytes that one rank has
    sent since the last `reset`, per axis, as collectives tell by `Collective.sent`.
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
    def begin(
        self, context: Context, collective: AnyCollective, axis: str, operand: Tensor, op: str
    ) -> Callable[[], Tensor]:
        """Start the transport of one collective, for `shardc.runtime.collectives`; what is returned waits for its end
        and gives what arrives. Shapes, and what `op` is, are the collective's affair."""

    def agreed(self, source: str) -> str:
        """What all processes take for `source`: that of the first."""
        return source

    def count(self, collective: AnyCollective, axis: str, operand: Tensor) -> None:
        """Add to `traffic` what one rank sends in this collective."""
        self.traffic[axis] += collective.sent(self.axes[axis], operand.numel() * operand.element_size())


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
    def start(self, collective: AnyCollective, axis: str, operand: Tensor, *, op: str = "") -> Started[Tensor]: ...
    @overload
    def start(
        self, collective: AnyCollective, axis: str, operand: Tensor, finish: Callable[[Tensor], Result], op: str = ""
    ) -> Started[Result]: ...
    def start(
        self,
        collective: AnyCollective,
        axis: str,
        operand: Tensor,
        finish: Callable[[Tensor], Any] = lambda moved: moved,
        op: str = "",
    ) -> Started[Any]:
        """Start one collective (see `Mesh.begin`) and count its bytes; it gives what `finish` makes of what arrives."""
        self.operation = (collective.name, axis)
        if self.rank == self.mesh.ranks[0]:
            self.mesh.count(collective, axis, operand)
        operand = operand.contiguous()
        arrive = self.mesh.begin(self, collective, axis, operand, op)
        self.operation = None
        held = [] if collective.works_on_copy else [operand]  # the others read their operand until they end

        def land() -> Any:
            self.operation = (collective.name, axis)
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
