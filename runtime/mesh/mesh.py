"""The mesh as generated code sees it: named axes, the running rank, and the start of its collectives."""

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
from shardc.runtime.execute.direct import unrecorded

Result = TypeVar("Result")

TIME = "time"
"""The axis along which micro-batches lie: its ranks run one after another, on every device."""

Turn = tuple[int, int]
"""The number of a micro-batch, and how many there are."""

_running = threading.local()


class RuntimeMesh(ABC):
    """Named axes and the ranks on them, numbered row-major: the first axis is the slowest.

    `axes` maps names to sizes. `ranks` are those that run in this process. `traffic` is the number of bytes, per axis,
    that one rank has sent since the last `reset`, by `Collective.counted`. RankError for an axis without ranks.
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
        """The coordinate of `rank` on each axis."""
        result: dict[str, int] = {}
        for name, size in reversed(self.axes.items()):
            rank, result[name] = divmod(rank, size)
        return {name: result[name] for name in self.axes}

    @abstractmethod
    def device(self, rank: int) -> torch.device:
        """The device that holds the tensors of `rank`."""

    @abstractmethod
    def run(
        self,
        function: Callable[..., Result],
        arguments: Callable[[int], tuple[Any, ...]],
        *,
        random: bool = False,
        turn: Turn = (0, 1),
    ) -> list[Result]:
        """Call `function(*arguments(rank))` on every local rank; return the results in the order of `ranks`. `turn`
        says for which micro-batch.

        Gradients are not recorded. With `random`, every rank draws from its own copy of torch's default CPU generator
        (under torch.distributed: of rank 0's), and the default generator then moves past the draws. A failure on any
        rank raises one RankError.
        """

    @abstractmethod
    def begin(
        self, context: Context, collective: AnyCollective, axis: str, operand: Tensor, op: str
    ) -> Callable[[], Tensor]:
        """Start the transport of one collective; the returned function waits for its end and returns its result.

        Only `shardc.runtime.collectives` calls it. The collective defines the shapes and the meaning of `op`.
        """

    def agreed(self, source: str) -> str:
        """The `source` of the first process, on all processes."""
        return source

    def count(self, collective: AnyCollective, axis: str, position: int, operand: Tensor, op: str) -> None:
        """Add to `traffic` the bytes that the rank at `position` of the axis sends in this collective."""
        self.traffic[axis] += collective.counted(self.axes[axis], position, operand, op)


class Context:
    """The running rank: its mesh, coordinates and device.

    `generator` is the run's random generator, None if the run draws no random numbers. `operation` is the
    (collective, axis) under way, for error messages.
    """

    def __init__(self, mesh: RuntimeMesh, rank: int, state: Tensor | None, turn: Turn = (0, 1)) -> None:
        self.mesh = mesh
        self.rank = rank
        self.microbatches = turn[1]
        self.coordinates: dict[str, int] = mesh.coordinates(rank)
        if self.microbatches > 1:
            self.coordinates[TIME] = turn[0]
        self.device: torch.device = mesh.device(rank)
        self.operation: tuple[str, str] | None = None
        self.generator: torch.Generator | None = None
        if state is not None:
            self.generator = torch.Generator()
            self.generator.set_state(state)

    def size(self, axis: str) -> int:
        """The number of ranks on `axis`; RankError where the mesh has no such axis."""
        if axis == TIME and self.microbatches > 1:
            return self.microbatches
        if axis not in self.mesh.axes:
            raise RankError(f"the mesh has no axis {axis!r}; it has {', '.join(self.mesh.axes)}")
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
        """Start one collective (see `RuntimeMesh.begin`) and count its bytes. Its result is `finish(what arrives)`."""
        operand = operand.contiguous()
        arrive = self.send(collective, axis, operand, op)
        operands = [] if collective.works_on_copy else [operand]  # transports without a copy read it until they end

        def land() -> Any:
            moved = arrive()
            operands.clear()
            return finish(moved)

        return Started(land)

    def send(self, collective: AnyCollective, axis: str, operand: Tensor, op: str) -> Callable[[], Tensor]:
        """Start the transport of a contiguous operand, and count its bytes; the returned function waits for its end."""
        self.operation = (collective.name, axis)
        if self.rank == self.mesh.ranks[0]:
            self.mesh.count(collective, axis, self.coordinates[axis], operand, op)
        arrive = self.mesh.begin(self, collective, axis, operand, op)
        self.operation = None

        def arrived() -> Tensor:
            self.operation = (collective.name, axis)
            moved = arrive()
            self.operation = None
            return moved

        return arrived

    def call(self, function: Callable[..., Result], arguments: Callable[[int], tuple[Any, ...]]) -> Result:
        """Call `function(*arguments(rank))` as the running rank of this thread. Every exception becomes a RankError."""
        try:
            with entered(self), torch.no_grad():
                given = arguments(self.rank)
                with unrecorded(function):
                    return function(*given)
        except Exception as error:
            raise rank_error(error, self.rank, self.coordinates, self.operation) from error


def current() -> Context:
    """The rank that runs in this thread; RankError outside of `RuntimeMesh.run`."""
    context: Context | None = getattr(_running, "context", None)
    if context is None:
        raise RankError(
            "no rank is running in this thread: call generated code through RuntimeMesh.run or an Executable"
        )
    return context


def microbatches() -> int:
    """Into how many micro-batches the batch of the run in this thread is divided; 1 where none runs."""
    context: Context | None = getattr(_running, "context", None)
    return 1 if context is None else context.microbatches


@contextmanager
def entered(context: Context) -> Generator[None]:
    """Make `context` the running rank of this thread."""
    before = getattr(_running, "context", None)
    _running.context = context
    try:
        yield
    finally:
        _running.context = before
