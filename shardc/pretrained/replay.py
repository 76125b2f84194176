"""The values of tensors whose construction was noted: one at a time, and those of a single device.

A tensor is made by the steps that lead to it, and by no others. Every random step takes its numbers where they stand
in the stream of a single device: steps that matter to no tensor draw, and what they draw is thrown away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from shardc.pretrained.recording import UNWRITTEN, NotedStep, Recording, Ref

States = Mapping[int, Tensor]
"""The state of the generator before a random step, by its number."""


class Replay:
    """The tensors of a recording."""

    def __init__(self, recording: Recording) -> None:
        self._steps: Sequence[NotedStep] = recording.steps
        self._writes: dict[int, list[int]] = defaultdict(list)
        for at, step in enumerate(self._steps):
            for storage in step.written:
                self._writes[storage].append(at)

    def written(self, ref: Ref) -> bool:
        """Whether some step gives the tensor values."""
        return any(self._steps[at].name not in UNWRITTEN for at in self._writes.get(ref.storage, ()))

    def chain(self, ref: Ref) -> list[int]:
        """The numbers of the steps that lead to a tensor, in order."""
        return self._chain([(ref.storage, len(self._steps))], set())

    def _chain(self, wanted: list[tuple[int, int]], also: set[int]) -> list[int]:
        """The numbers of the steps that lead to storages, each as it is before a step; and those of `also`."""
        met: set[tuple[int, int]] = set()
        while wanted:
            storage, before = wanted.pop()
            for at in reversed(self._writes.get(storage, ())):
                if at >= before or (storage, at) in met:
                    continue
                met.add((storage, at))
                step = self._steps[at]
                wanted += [(other, at) for other in step.read if other != storage]
                if storage in step.whole:
                    break
        return sorted({at for _, at in met} | also)

    def run(self, chain: Sequence[int], ref: Ref | None, states: States) -> Tensor:
        """The values of a tensor, by the steps that lead to it; of none, an empty tensor. Before a random step whose
        state is in `states` its generator gets that. Only the generator of the last random step has moved after it."""
        storages: dict[int, Any] = {}
        random = [_generator(self._steps[at]) for at in chain if at in states]
        before = {id(one): (one, one.get_state()) for one in random if one is not random[-1]}
        with torch.no_grad():
            for at in chain:
                if at in states:
                    _generator(self._steps[at]).set_state(states[at])
                _run(self._steps[at], storages)
            for generator, state in before.values():
                generator.set_state(state)
            return torch.empty(0) if ref is None else _view(ref, storages)

    def values(self, wanted: Sequence[Ref], advance: bool, take: Callable[[int, Tensor], None]) -> None:
        """Call `take` with the number and the values of each wanted tensor, of which one exists at a time.

        With `advance` all random steps draw, so that numbers are those of a single device that runs everything; else
        only those that lead to what is wanted do."""
        chains = {at: self.chain(ref) for at, ref in enumerate(wanted)}
        draws = [at for at, step in enumerate(self._steps) if step.random]
        if advance:  # how many numbers such a step takes may depend on what it reads
            chains |= {-1 - at: self._chain_to(at) for at in draws if self._steps[at].read - self._steps[at].whole}
        needed = {at for chain in chains.values() for at in chain}
        draws = draws if advance else [at for at in draws if at in needed]
        drawing = set(draws)
        ends: dict[int, list[int]] = defaultdict(list)
        for number, chain in chains.items():
            ends[max((at for at in chain if at in drawing), default=-1)].append(number)
        states: dict[int, Tensor] = {}
        for at in (-1, *draws):
            if at in needed:
                states[at] = _generator(self._steps[at]).get_state()
            for number in ends[at]:
                if number >= 0:
                    take(number, self.run(chains[number], wanted[number], states))
                else:
                    self.run(chains[number], None, states)
            if at >= 0 and not ends[at]:
                self.run([at], None, {})

    def _chain_to(self, at: int) -> list[int]:
        """The numbers of the steps that lead to a step, and its own."""
        return self._chain([(storage, at) for storage in self._steps[at].read], {at})


def _generator(step: NotedStep) -> torch.Generator:
    return step.kwargs.get("generator") or torch.default_generator


def _run(step: NotedStep, storages: dict[int, Any]) -> None:
    def real(leaf: Any) -> Any:
        return _view(leaf, storages) if isinstance(leaf, Ref) else leaf

    args, kwargs = pytree.tree_map(real, (step.args, dict(step.kwargs)))
    with _default_dtype(step.dtype):
        made = step.function(*args, **kwargs)
    for value, one in zip(pytree.tree_leaves(made), pytree.tree_leaves(step.results), strict=True):
        if isinstance(one, Ref) and one.storage not in storages:
            storages[one.storage] = value.untyped_storage()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    now = torch.get_default_dtype()
    if now == dtype:
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(now)


def _view(ref: Ref, storages: dict[int, Any]) -> Tensor:
    if ref.storage not in storages:
        storages[ref.storage] = torch.UntypedStorage(ref.nbytes)
    return torch.empty(0, dtype=ref.dtype).set_(storages[ref.storage], ref.offset, ref.size, ref.stride)
