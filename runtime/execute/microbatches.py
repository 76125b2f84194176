"""Micro-batches: a module for one of them runs several times, on parts of the batch; what they make is put together.

    loss = model(x, y)       for each part: forward, backward with a gradient of one; gradients are added up
    (0.5 * loss).backward()  the sums are reduced once, and scaled by 0.5

So what a device holds is what one micro-batch leaves for backward. Where the outputs are no single number, or float16
might lose a gradient that is scaled later, forward keeps nothing, and backward runs it again for every part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardc.runtime.errors import RankError
from shardc.runtime.execute.accumulation import GradientSums
from shardc.runtime.execute.ambient import Surroundings, no_autocast
from shardc.runtime.execute.second_derivatives import Second, once
from shardc.runtime.execute.slots import Slot
from shardc.runtime.execute.transforms import is_batched
from shardc.runtime.mesh.mesh import Turn

if TYPE_CHECKING:
    from shardc.runtime.execute.executable import Executable, Fallback

Parts = list[Tensor]
"""What each local rank has of a value."""


@dataclass
class _Made:
    """What the micro-batches have made so far: outputs and gradients, by their place, of each local rank."""

    executable: Executable
    slots: Sequence[Slot]
    parts: dict[int, list[Parts]] = field(default_factory=dict[int, list[Parts]])
    owned: set[int] = field(default_factory=set[int])

    def add(self, results: Sequence[Sequence[Tensor | None]]) -> None:
        """Add what one micro-batch made: the results of each local rank."""
        for place, slot in enumerate(self.slots):
            made = [result[place] for result in results]
            there = [one for one in made if one is not None]
            if len(there) < len(made):
                continue
            known = self.parts.setdefault(place, [])
            if slot.batch or not known:
                known.append(there)
            elif slot.sums and place in self.owned:
                for whole, addend in zip(known[0], there, strict=True):
                    whole.add_(addend)
            elif slot.sums:  # what was made first may be a part of something else
                known[0] = [one + other for one, other in zip(known[0], there, strict=True)]
                self.owned.add(place)

    def addends(self, place: int) -> Parts:
        """What each local rank has added up."""
        return self.parts[place][0]

    def value(self, place: int) -> Tensor:
        """The user's tensor, put together."""
        slot = self.slots[place]
        if not slot.batch:
            return self.executable.left(slot, self.addends(place))
        return self.executable.in_memory(slot, self.executable.boundary.join(slot, self.parts[place]))


class DividedBatch:
    """A batch with the state that a program reads, as the micro-batches take them."""

    def __init__(self, executable: Executable, values: Mapping[str, Tensor]) -> None:
        self.executable, self.count = executable, executable.microbatches
        self.random = torch.get_rng_state() if executable.random else None
        divided = {slot.name for slot in executable.inputs if slot.batch}
        self.values = {  # a DTensor's rows lie in other parts than those of micro-batches
            name: value.full_tensor() if name in divided and isinstance(value, DTensor) else value
            for name, value in values.items()
        }
        mesh = executable.mesh
        self.same = {
            (slot.name, rank): executable.boundary.enter(slot, self.values[slot.name], rank)
            for slot in executable.inputs
            if not slot.batch
            for rank in mesh.ranks
        }

    def turns(self) -> list[Turn]:
        """The micro-batches, in order."""
        return [(number, self.count) for number in range(self.count)]

    def forward(self, turn: Turn) -> list[Any]:
        """Run forward on one micro-batch. Each draws its part of the random numbers that the batch draws."""
        executable = self.executable

        def arguments(rank: int) -> tuple[Tensor, ...]:
            return tuple(
                executable.boundary.enter(slot.of_microbatch, part(slot, self.values[slot.name], turn), rank)
                if slot.batch
                else self.same[slot.name, rank]
                for slot in executable.inputs
            )

        if self.random is not None:
            torch.set_rng_state(self.random)
        with no_autocast(), torch.no_grad():
            return executable.mesh.run(executable.module.forward, arguments, random=executable.random, turn=turn)

    def backward(self, saved: Sequence[Sequence[Any]], tangents: Mapping[int, Tensor], turn: Turn) -> list[Any]:
        """Run backward on what forward saved of one micro-batch."""
        executable = self.executable

        def arguments(rank: int) -> tuple[list[Any]]:
            values = [*saved[executable.mesh.ranks.index(rank)]]
            for slot in executable.tangents:
                tangent = tangents.get(slot.index)
                tangent = None if tangent is None else part(slot, tangent, turn)
                values.append(executable.boundary.enter_tangent(slot.of_microbatch, tangent, rank))
            return (values,)

        with no_autocast(), torch.no_grad():
            return executable.mesh.run(executable.module.backward, arguments, turn=turn)


def part(slot: Slot, value: Tensor, turn: Turn) -> Tensor:
    """What one micro-batch has of a value."""
    if not slot.batch:
        return value
    dim, count = slot.batch
    if isinstance(value, DTensor):
        value = value.full_tensor()
    size = value.shape[dim] // count
    return value.detach().narrow(dim, turn[0] * size, size)


def run_microbatches(
    executable: Executable,
    values: dict[str, Tensor],
    fallback: Fallback | None,
    sums: GradientSums | None,
    recording: bool,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The outputs of all micro-batches of a batch, tied into autograd if `recording`, and new values of buffers."""
    values |= executable.before(values)
    run = _BatchCall(executable, fallback, sums, [slot.name for slot in executable.inputs])
    if not recording:
        return _told(run, _forward(DividedBatch(executable, values), executable))
    tensors = [values[name] for name in run.names]
    made = list(_Microbatched.apply(run, Second.apply(*tensors), *tensors))
    return made, run.mutations


@dataclass
class _BatchCall:
    """What one run is asked for: the names of its tensors, in order; and what it changes."""

    executable: Executable
    fallback: Fallback | None
    sums: GradientSums | None
    names: list[str]
    mutations: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def _forward(batch: DividedBatch, executable: Executable) -> _Made:
    outputs = _Made(executable, executable.module.OUTPUTS)
    for turn in batch.turns():
        outputs.add([result[0] for result in batch.forward(turn)])
    return outputs


def _told(run: _BatchCall, made: _Made) -> tuple[list[Tensor], dict[str, Tensor]]:
    outputs: list[Tensor] = []
    for place, slot in enumerate(made.slots):
        value = made.value(place)
        if slot.role == "output":
            outputs.append(value)
        else:
            run.mutations[slot.name] = value
    return outputs, run.mutations


class _Microbatched(torch.autograd.Function):
    """All micro-batches of a batch as one node of the autograd graph."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, run: _BatchCall, second: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        executable = run.executable
        values = {name: tensor.detach() for name, tensor in zip(run.names, tensors, strict=True)}
        changed = {name: values[name].clone() for name in run.names if name in executable.mutated}
        batch = DividedBatch(executable, {**values, **changed})
        ctx.gradients = None
        if executable.at_once:
            outputs, ctx.gradients = (
                _Made(executable, executable.module.OUTPUTS),
                _Made(executable, executable.gradients),
            )
            one = {slot.index: _one(slot, executable) for slot in executable.tangents}
            for turn in batch.turns():
                results = batch.forward(turn)
                outputs.add([result[0] for result in results])
                ctx.gradients.add(batch.backward([result[1] for result in results], one, turn))
                del results
            batch.same.clear()
        else:
            outputs = _forward(batch, executable)
        again = () if executable.at_once else (t for n, t in zip(run.names, tensors, strict=True) if n not in changed)
        ctx.save_for_backward(second, *again)  # which raises where one was changed in place
        ctx.batch, ctx.run, ctx.surroundings = batch, run, Surroundings()
        ctx.kinds = [type(tensor) for tensor in tensors]
        names = executable.deferred if run.sums is not None else ()
        ctx.leaves = {n: t for n, t in zip(run.names, tensors, strict=True) if n in names and t.requires_grad}
        made, _ = _told(run, outputs)
        ctx.mark_non_differentiable(*(one for one in made if not (one.is_floating_point() or one.is_complex())))
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *tangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if any(tangent is not None and is_batched(tangent) for tangent in tangents):
            raise RankError("backward got a batch of gradients at once, which a sharded model does not take")
        run: _BatchCall = ctx.run
        executable = run.executable
        second, *_ = ctx.saved_tensors
        arrived = {
            slot.index: tangent
            for slot, tangent in zip(executable.outputs, tangents, strict=True)
            if tangent is not None
        }
        with torch.no_grad():
            gradients = _Microbatched._gradients(ctx, arrived)
        needs = zip(run.names, ctx.needs_input_grad[2:], strict=True)
        grads = [gradients.get(name) if need else None for name, need in needs]
        handed = [
            executable.boundary.hand_over(gradient, kind) for gradient, kind in zip(grads, ctx.kinds, strict=True)
        ]
        return (None, None, *(once(handed, second, tangents) if torch.is_grad_enabled() else handed))

    @staticmethod
    def _gradients(ctx: Any, arrived: Mapping[int, Tensor]) -> dict[str, Tensor]:
        run: _BatchCall = ctx.run
        executable, made = run.executable, ctx.gradients
        uncovered = arrived.keys() - {slot.index for slot in executable.tangents}
        if uncovered:
            if run.fallback is None:
                raise RankError(f"output {min(uncovered)} got a gradient, but backward does not start from it")
            with ctx.surroundings.again():
                other = run.fallback(frozenset(arrived))
            batch = DividedBatch(other, {**ctx.batch.values, **other.before(ctx.batch.values)})
            batch.random = ctx.batch.random
            return _put_together(other, _again(batch, arrived), arrived, None, {})
        if not torch._C._autograd._get_current_graph_task_keep_graph():  # pyright: ignore
            ctx.gradients = None
        if made is None:
            return _put_together(executable, _again(ctx.batch, arrived), arrived, run.sums, ctx.leaves)
        if not arrived:
            return {}
        (scale,) = (tangent.full_tensor() if isinstance(tangent, DTensor) else tangent for tangent in arrived.values())
        scaled = replace(made, parts={place: _scaled(parts, scale) for place, parts in made.parts.items()})
        return _put_together(executable, scaled, arrived, run.sums, ctx.leaves)


def _one(slot: Slot, executable: Executable) -> Tensor:
    device = executable.mesh.device(executable.mesh.ranks[0])
    return torch.ones(slot.shape, dtype=getattr(torch, slot.dtype), device=device)


def _scaled(parts: list[Parts], scale: Tensor) -> list[Parts]:
    return [[one * scale.to(one.dtype) for one in ranks] for ranks in parts]


def _again(batch: DividedBatch, tangents: Mapping[int, Tensor]) -> _Made:
    """Forward and backward of every micro-batch, once more."""
    made = _Made(batch.executable, batch.executable.gradients)
    before = torch.get_rng_state()
    try:
        for turn in batch.turns():
            saved = [result[1] for result in batch.forward(turn)]
            made.add(batch.backward(saved, tangents, turn))
            del saved
    finally:
        torch.set_rng_state(before)
    return made


def _put_together(
    executable: Executable,
    made: _Made,
    arrived: Mapping[int, Tensor],
    sums: GradientSums | None,
    leaves: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Gradients by name; those that wait for the epilogue are reduced now, or go to `sums`."""
    places = {
        slot.name: place
        for place, slot in enumerate(made.slots)
        if place in made.parts and (not slot.depends_on or arrived.keys() & set(slot.depends_on))
    }
    deferred = {name: made.addends(places.pop(name)) for name in executable.deferred if name in places}
    gradients = {name: made.value(place) for name, place in places.items()}
    return gradients | executable.deliver(deferred, sums, leaves)
