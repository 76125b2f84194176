"""A mesh whose ranks are threads of this process, so that a plan runs and fails on a laptop as it does on a cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.collectives.collective import AnyCollective
from shardc.runtime.errors import RankError
from shardc.runtime.mesh.mesh import Context, Result, RuntimeMesh, Turn

_Posted = tuple[Tensor, str]
"""What a rank posts: its operand, and the `op` of `Context.start`."""


class _Aborted(Exception):
    """Another rank failed, so this one stops."""


class _Run:
    """State that the ranks of one run share: one lock, and per group the operands of the collective under way."""

    def __init__(self, size: int) -> None:
        self.condition = threading.Condition()
        self.running = size
        self.waiting: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.failed = False
        self.groups: dict[tuple[str, tuple[int, ...]], _Group] = {}

    def check_stuck(self) -> None:
        """Abort if all running ranks wait for each other. The caller holds the lock."""
        if self.waiting and len(self.waiting) == self.running:
            self.failed = True
            self.condition.notify_all()


class _Group:
    def __init__(self, size: int) -> None:
        self.size = size
        self.posted: dict[int, tuple[str, _Posted]] = {}
        self.complete: list[tuple[str, _Posted]] = []
        self.fetched = 0
        self.round = 0


class VirtualMesh(RuntimeMesh):
    """Every rank is a thread of this process. Reductions go in rank order, so results are deterministic."""

    def __init__(self, axes: Mapping[str, int], device_type: str = "cpu") -> None:
        super().__init__(axes)
        self._device = torch.device(device_type)
        # Threads live from run to run, because torch starts a new pool of OpenMP threads for each new thread.
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix="rank")
        self._one_at_a_time = threading.Lock()
        self._run = _Run(self.size)

    def device(self, rank: int) -> torch.device:
        """The same for all ranks."""
        return self._device

    def run(
        self,
        function: Callable[..., Result],
        arguments: Callable[[int], tuple[Any, ...]],
        *,
        random: bool = False,
        turn: Turn = (0, 1),
    ) -> list[Result]:
        """See `RuntimeMesh.run`. If several ranks fail, the error is that of the lowest."""
        with self._one_at_a_time:
            self._run = run = _Run(self.size)
            state = torch.get_rng_state() if random else None
            contexts = [Context(self, rank, state, turn) for rank in self.ranks]
            if self.size == 1:  # a thread of its own costs more than a small program
                results = [contexts[0].call(function, arguments)]
            else:
                results = self._in_threads(run, contexts, function, arguments)
            if contexts[0].generator is not None:
                torch.set_rng_state(contexts[0].generator.get_state())
            return results

    def _in_threads(
        self,
        run: _Run,
        contexts: list[Context],
        function: Callable[..., Result],
        arguments: Callable[[int], tuple[Any, ...]],
    ) -> list[Result]:
        def work(context: Context) -> Result:
            try:
                return context.call(function, arguments)
            except BaseException:
                with run.condition:
                    run.failed = True
                    run.condition.notify_all()
                raise
            finally:
                with run.condition:
                    run.running -= 1
                    run.check_stuck()

        futures = [self._threads.submit(work, context) for context in contexts]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        if errors:
            # Report a rank that failed by itself. If there is none, all ranks waited for each other: report any.
            raise next((error for error in errors if not isinstance(error.__cause__, _Aborted)), errors[0])
        return [future.result() for future in futures]

    def begin(
        self, context: Context, collective: AnyCollective, axis: str, operand: Tensor, op: str
    ) -> Callable[[], Tensor]:
        """See `RuntimeMesh.begin`. The collective runs to its end at once."""
        others = tuple(index for name, index in context.coordinates.items() if name != axis)
        position = context.coordinates[axis]
        told = "" if collective.uneven else op
        shape = ("rows", *operand.shape[1:]) if collective.uneven else tuple(operand.shape)
        label = f"{collective.name}({shape}, {operand.dtype}{', ' + told if told else ''})"
        posted = self._meet(context.rank, (axis, others), position, label, (operand, op))
        ops = ";".join(one for _, one in posted) if collective.uneven else op
        result = collective.exchange([one for one, _ in posted], position, ops)
        return lambda: result

    def _meet(
        self, rank: int, key: tuple[str, tuple[int, ...]], position: int, label: str, posted: _Posted
    ) -> list[_Posted]:
        """Wait for all ranks of the group; return what they posted, in order."""
        run = self._run
        with run.condition:
            group = run.groups.setdefault(key, _Group(self.axes[key[0]]))
            group.posted[position] = (label, posted)
            if len(group.posted) == group.size:
                group.complete = [group.posted[index] for index in range(group.size)]
                group.posted = {}
                group.round += 1
                run.waiting = {other: at for other, at in run.waiting.items() if at != key}
                run.condition.notify_all()
            else:
                this_round = group.round
                run.waiting[rank] = key
                run.check_stuck()
                while group.round == this_round and not run.failed:
                    run.condition.wait()
                if group.round == this_round:
                    raise _Aborted(f"another rank on axis {key[0]!r} never started {label}")
            complete = group.complete
            group.fetched += 1
            if group.fetched == group.size:  # nobody reads the operands any more
                group.complete, group.fetched = [], 0
        labels = [label for label, _ in complete]
        if len(set(labels)) > 1:
            raise RankError(
                f"the ranks of axis {key[0]!r} disagree on the collective: {', '.join(labels)}. "
                "All must start the same one"
            )
        return [one for _, one in complete]
