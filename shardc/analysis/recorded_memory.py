"""Memory, recorded: what is held while every call of a run is at its fullest, and who made what is held at the peak.

Moment("forward", %mm, {"parameters": 4096.0, "in use": 512.0})
Moment("forward", %relu, {"parameters": 4096.0, "in use": 1024.0})
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from torch import fx

from shardc.analysis.memory import Execution, MemoryAnalysis
from shardc.analysis.timeline import Order
from shardc.ir.facts import dtype_of, origin_of


class Moment(NamedTuple):
    """What a rank holds while one call of forward or backward (`phase`) runs, in bytes by label."""

    phase: str
    node: fx.Node
    held: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.held.values())


class RecordedMemory(NamedTuple):
    """`moments` has one entry for every entry of the orders, `peak` the most bytes of one. `storages` has per value, by
    its name, the numbers of its tensors' storages and their bytes."""

    peak: float
    moments: tuple[Moment, ...]
    storages: Mapping[str, tuple[tuple[int, int], ...]]


def recorded_memory(memory: MemoryAnalysis, forward: Order, backward: Order) -> RecordedMemory:
    """What is held when forward and backward run in these orders."""
    run = _RecordedExecution(memory)
    peak = run.memory(forward, backward).peak
    storages = {
        node.name: tuple((one.storage, run.sizes[one.storage]) for one in made if one is not None)
        for node, made in run.tensors.items()
    }
    return RecordedMemory(peak, tuple(run.moments), storages)


def peak_by_module(memory: MemoryAnalysis, forward: Order, backward: Order, peak: float) -> Mapping[str, float]:
    """In which modules the bytes of the peak were made: parameters and what the optimizer holds for them by the module
    that has them. `peak` is that of a run in the same orders."""
    run = _AttributedExecution(memory, peak)
    run.memory(forward, backward)
    return {module: float(held) for module, held in run.by_module.items() if held}


class _RecordedExecution(Execution):
    def __init__(self, known: MemoryAnalysis) -> None:
        super().__init__(known)
        self.moments: list[Moment] = []

    def noted(self, phase: str, node: fx.Node, workspace: int) -> None:
        super().noted(phase, node, workspace)
        self.moments.append(Moment(phase, node, self.parts(workspace)))


class _AttributedExecution(Execution):
    """A run that notes which node made every storage, and counts what is held at the peak by their modules."""

    def __init__(self, known: MemoryAnalysis, peak: float) -> None:
        super().__init__(known)
        self.by_module: Counter[str] = Counter()
        self._makers: list[fx.Node] = []  # of every storage
        self._goal = peak

    def _place(self, node: fx.Node, label: str) -> None:
        super()._place(node, label)
        self._made(node)

    def noted(self, phase: str, node: fx.Node, workspace: int) -> None:
        self._made(node)
        super().noted(phase, node, workspace)
        if not self.by_module and self.total + workspace >= self._goal:
            self._attribute(node, workspace)

    def _made(self, node: fx.Node) -> None:
        """The storages that nobody made so far are this node's."""
        self._makers += [node] * (len(self.sizes) - len(self._makers))

    def _attribute(self, node: fx.Node, workspace: int) -> None:
        for storage, maker in enumerate(self._makers):
            if self.references[storage]:
                self.by_module[self._module(maker)] += self.sizes[storage]
        for trained in self.known.trained:
            size = dtype_of(trained).itemsize
            self.by_module[self._module(trained)] += int(self._bytes_of(trained) / size * self.known.states(size))
        self.by_module[self._module(node)] += workspace

    def _bytes_of(self, node: fx.Node) -> int:
        stored = self.tensors[node][0]
        assert stored is not None
        return self.sizes[stored.storage]

    def _module(self, node: fx.Node) -> str:
        return origin_of(node).module or self.known.names.get(node, "").rpartition(".")[0]
