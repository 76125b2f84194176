"""Runs a generated module on a mesh: cuts its inputs, pastes its outputs, and ties its backward into autograd."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardc.runtime.errors import GENERATED, RankError
from shardc.runtime.execute.accumulation import GradientSums, deferred_leaves
from shardc.runtime.execute.ambient import Surroundings, no_autocast
from shardc.runtime.execute.boundary import Boundary, boundary
from shardc.runtime.execute.direct import call_directly
from shardc.runtime.execute.microbatches import run_microbatches
from shardc.runtime.execute.second_derivatives import Second, once
from shardc.runtime.execute.slot_tensors import SlotTensors
from shardc.runtime.execute.slots import Slot, ordered
from shardc.runtime.execute.transforms import is_batched
from shardc.runtime.kernels.random import INDEPENDENT
from shardc.runtime.mesh.distributed import local_mesh
from shardc.runtime.mesh.mesh import RuntimeMesh

PROLOGUE = "prologue:"
"""What the names of values begin with that the prologue computes."""

Fallback = Callable[[frozenset[int]], "Executable"]


@dataclass
class _Forward:
    """Results of one forward run: flat outputs, new buffer values by name, and the saved values of each local rank."""

    outputs: list[Tensor]
    mutations: dict[str, Tensor]
    saved: list[tuple[Any, ...]]


class Executable:
    """A generated module on a mesh (by default the one that `local_mesh` picks for its MESH)."""

    def __init__(self, module: ModuleType, mesh: RuntimeMesh | None = None) -> None:
        self.module = module
        setattr(module, GENERATED, True)  # also where it was imported as any other file
        call_directly(module)
        axes: dict[str, int] = module.MESH
        if mesh is not None and mesh.axes != axes:
            raise RankError(f"the module was generated for the mesh {axes}, not {mesh.axes}: compile it for that mesh")
        self.mesh: RuntimeMesh = local_mesh(axes) if mesh is None else mesh
        self.inputs: tuple[Slot, ...] = tuple(module.INPUTS)
        self.outputs: tuple[Slot, ...] = tuple(slot for slot in module.OUTPUTS if slot.role == "output")
        self.tangents: tuple[Slot, ...] = tuple(getattr(module, "TANGENTS", ()))
        self.gradients: tuple[Slot, ...] = tuple(getattr(module, "GRADIENTS", ()))
        deferred: tuple[int, ...] = getattr(module, "DEFERRED", ())
        self.deferred: dict[str, Slot] = {self.gradients[place].name: self.gradients[place] for place in deferred}
        self._addends: dict[str, list[Tensor]] = {}  # what each local rank leaves for the epilogue: sizes alone
        self.random: bool = bool(getattr(module, "RANDOM", False))
        self.microbatches: int = getattr(module, "MICROBATCHES", 1)
        self.at_once: bool = getattr(module, "AT_ONCE", False)
        self.prologue: tuple[Slot, ...] = tuple(getattr(module, "PROLOGUE", ()))
        self.boundary: Boundary = boundary(self.mesh)
        self.mutated = {slot.name for slot in module.OUTPUTS if slot.role == "mutation"}
        slots = (*self.inputs, *self.prologue)
        self._given = list({slot.name: slot for slot in slots if not slot.name.startswith(PROLOGUE)}.values())
        self._tensors = SlotTensors(self._given)

    def run(
        self,
        state: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        fallback: Fallback | None = None,
        sums: GradientSums | None = None,
        record: bool = False,
    ) -> list[Tensor]:
        """The program's flat outputs, tied into autograd if gradients are on and some tensor requires one.

        `state` maps the names of parameters, buffers and constants to tensors: global ones on a virtual mesh; DTensors
        or global ones under torch.distributed. `inputs` are the flat inputs, by index. For outputs and gradients see
        `shardc.runtime.execute.boundary`. The program changes its buffers and inputs in place, as the model does.

        Where an output gets a gradient from which this executable's backward does not start, `run` calls `fallback`
        with the indices of all outputs that got one. It returns an executable whose backward starts from them. Without
        a fallback this is a RankError. So is a tensor that is missing, or has another shape or dtype than its slot. A
        `state` that is a `WatchedState` is looked at once.

        With `sums`, the gradients that the module's epilogue reduces go there instead of to their parameters. With
        `record`, outputs may get a gradient where gradients are off, too: the model turns them on for itself.
        """
        tensors = self._tensors.of(state, inputs)
        names = {slot.name: tensor for slot, tensor in zip(self._given, tensors, strict=True)}
        recording = record or (torch.is_grad_enabled() and hasattr(self.module, "backward"))
        recording = recording and not torch.is_inference_mode_enabled()  # in which nothing is recorded, whatever is on
        recording = recording and any(tensor.requires_grad for tensor in tensors)
        mutations: dict[str, Tensor] = {}
        with torch.enable_grad() if recording else nullcontext():
            if self.microbatches > 1:
                outputs, mutations = run_microbatches(self, names, fallback, sums, recording)
            elif recording:
                run = _Asked(self, fallback, mutations, sums)
                outputs = list(_Differentiable.apply(run, Second.apply(*tensors), *tensors))
            else:
                result = self._forward(names, differentiable=False)
                outputs, mutations = result.outputs, result.mutations
        self._mutate(mutations, names)
        return outputs

    def bind(self, model_or_state: nn.Module | Mapping[str, Tensor]) -> Callable[..., list[Tensor]]:
        """A callable from the flat inputs, in order, to the flat outputs.

        It runs with the parameters and buffers of a model, looked up at every call, or with those of a state dict.
        """

        def call(*inputs: Tensor) -> list[Tensor]:
            state = model_or_state
            if isinstance(state, nn.Module):
                named = dict(state.named_parameters(remove_duplicate=False))
                state = {**named, **dict(state.named_buffers(remove_duplicate=False))}
            return self.run(state, inputs)

        return call

    def _mutate(self, mutations: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in mutations.items():
                self.boundary.store(targets[name], value)

    def _forward(self, values: Mapping[str, Tensor], differentiable: bool = True) -> _Forward:
        # Backward needs the values from before the run, so a buffer that the run changes goes in as a copy.
        if differentiable:
            copies = {name: value.detach().clone() for name, value in values.items() if name in self.mutated}
            values = {**values, **copies}

        def arguments(rank: int) -> tuple[Tensor, ...]:
            return tuple(self.boundary.enter(slot, values[slot.name], rank) for slot in self.inputs)

        with no_autocast():
            results = self.mesh.run(self.module.forward, arguments, random=self.random)
        if not differentiable and self.mutated:
            results = self._apart(results, [values[name] for name in self.mutated if name in values])
        outputs: list[Tensor] = []
        mutations: dict[str, Tensor] = {}
        with torch.no_grad():
            for position, slot in enumerate(self.module.OUTPUTS):
                value = self.left(slot, [result[0][position] for result in results])
                if slot.role == "output":
                    outputs.append(value)
                else:
                    mutations[slot.name] = value
        return _Forward(outputs, mutations, [tuple(result[1]) for result in results])

    def _apart(self, results: Sequence[Any], changed: Sequence[Tensor]) -> list[Any]:
        """The results of all ranks, with copies of those that lie in the memory of what is about to be changed."""
        local = [value.to_local() if isinstance(value, DTensor) else value for value in changed]
        memory = {value.untyped_storage().data_ptr() for value in local}

        def apart(value: Any) -> Any:
            shares = isinstance(value, Tensor) and value.untyped_storage().data_ptr() in memory
            return value.clone() if shares else value

        return [(tuple(map(apart, result[0])), *result[1:]) for result in results]

    def _backward(
        self,
        saved: list[list[Any]],
        tangents: Mapping[int, Tensor],
        sums: GradientSums | None,
        leaves: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Gradients by name, from the tangents by output index. Absent tangents count as zeros, but there is no
        gradient that depends on absent ones alone. Those of `leaves` that wait for the epilogue go to `sums`, where
        there are any.

        The generated code empties the lists of saved values, so that each value is freed after its last use.
        """

        def arguments(rank: int) -> tuple[Any, ...]:
            values = saved[self.mesh.ranks.index(rank)]
            values += (self.boundary.enter_tangent(slot, tangents.get(slot.index), rank) for slot in self.tangents)
            return (values,)

        with no_autocast():
            results = self.mesh.run(self.module.backward, arguments)
        parts = {
            slot.name: [result[position] for result in results]
            for position, slot in enumerate(self.gradients)
            if results[0][position] is not None and (not slot.depends_on or tangents.keys() & set(slot.depends_on))
        }
        deferred = {name: parts.pop(name) for name in self.deferred if name in parts}
        with torch.no_grad():
            gradients = {slot.name: self.left(slot, parts[slot.name]) for slot in self.gradients if slot.name in parts}
            return gradients | self.deliver(deferred, sums, leaves)

    def deliver(
        self, addends: Mapping[str, list[Tensor]], sums: GradientSums | None, leaves: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the epilogue makes of what each local rank has added up, by name; of `leaves`, `sums` gets it."""
        self._addends |= {name: [torch.empty_like(one, device="meta") for one in addends[name]] for name in addends}
        if sums is None:
            return self.reduced(addends)
        wanted = {name: addends[name] for name in addends if name in leaves}  # of what is frozen nobody wants any
        adding = deferred_leaves({name: leaves[name] for name in wanted})
        if adding:
            sums.add(self, {name: wanted.pop(name) for name in adding}, adding)
        return self.reduced(wanted)

    def reduced(self, sums: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """The gradients that the epilogue makes of sums: by name, what each local rank has added up."""
        if not sums:
            return {}

        def arguments(rank: int) -> tuple[list[Tensor]]:
            place = self.mesh.ranks.index(rank)
            device = self.mesh.device(rank)
            nothing = {n: self._addends[n][place] for n in self.deferred if n not in sums}
            given = {n: torch.zeros_like(one, device=device) for n, one in nothing.items()}
            return ([sums[name][place] if name in sums else given[name] for name in self.deferred],)

        with no_autocast(), torch.no_grad():
            results = self.mesh.run(self.module.epilogue, arguments)
            return {
                name: self.left(slot, [result[position] for result in results])
                for position, (name, slot) in enumerate(self.deferred.items())
                if name in sums
            }

    def before(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the prologue makes of all of the batch, by name; it is whole on every rank."""
        if not self.prologue:
            return {}

        def arguments(rank: int) -> tuple[Tensor, ...]:
            return tuple(self.boundary.enter(slot, values[slot.name], rank) for slot in self.prologue)

        with no_autocast(), torch.no_grad():
            results = self.mesh.run(self.module.prologue, arguments)
        return {f"{PROLOGUE}{number}": one.detach() for number, one in enumerate(results[0][0])}

    def left(self, slot: Slot, parts: Sequence[Tensor]) -> Tensor:
        """The user's tensor from the values of the local ranks, in memory as on one device.

        A DTensor's part lies as its rank left it, and a mutation is copied into a tensor that lies somehow.
        """
        return self.in_memory(slot, self.boundary.leave(slot, parts))

    def in_memory(self, slot: Slot, value: Tensor) -> Tensor:
        """A tensor that left, in memory as on one device."""
        return value if isinstance(value, DTensor) or slot.role == "mutation" else ordered(value, slot.order)


@dataclass
class _Asked:
    """What one run is asked for, and the buffers that it changes."""

    executable: Executable
    fallback: Fallback | None
    mutations: dict[str, Tensor]
    sums: GradientSums | None


class _Differentiable(torch.autograd.Function):
    """One run as one node of the autograd graph."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, run: _Asked, second: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        executable, fallback = run.executable, run.fallback
        names = [slot.name for slot in executable.inputs]
        values = dict(zip(names, tensors, strict=True))
        # If the fallback runs the forward again, it must draw the same random numbers.
        ctx.random_state = torch.get_rng_state() if executable.random and fallback is not None else None
        # what is written, also where it is an input as well
        written = {id(values[name]) for name in mutations_of(executable)} if fallback is not None else ()
        ctx.before = {name: value.clone() for name, value in values.items() if id(value) in written}
        result = executable._forward(values)  # pyright: ignore[reportPrivateUsage]
        run.mutations.update(result.mutations)
        # save_for_backward releases tensors with the graph and raises where one was changed in place.
        flat = [value for saved in result.saved for value in saved if isinstance(value, Tensor)]
        again = [] if fallback is None else [value for name, value in values.items() if name not in ctx.before]
        ctx.save_for_backward(second, *flat, *again)
        ctx.kept = [[None if isinstance(value, Tensor) else (value,) for value in saved] for saved in result.saved]
        ctx.executable, ctx.fallback, ctx.names, ctx.sums = executable, fallback, names, run.sums
        deferred = executable.deferred if run.sums is not None else ()
        ctx.leaves = {name: values[name] for name in deferred if values[name].requires_grad}
        ctx.surroundings = Surroundings()
        ctx.kinds = [type(tensor) for tensor in tensors]
        numbers = (torch.is_floating_point, torch.is_complex)
        ctx.mark_non_differentiable(*(out for out in result.outputs if not any(test(out) for test in numbers)))
        ctx.set_materialize_grads(False)
        return tuple(result.outputs)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *tangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if any(tangent is not None and is_batched(tangent) for tangent in tangents):
            raise RankError(
                "backward got a batch of gradients at once (is_grads_batched=True, or vectorize=True), which a sharded "
                "model does not take: call backward once for each"
            )
        tensors = deque(ctx.saved_tensors)  # nobody else holds them: each is freed after its last use
        second = tensors.popleft()
        with torch.no_grad():
            grads = _Differentiable._gradients(ctx, tensors, tangents)
        return (None, None, *(once(grads, second, tangents) if torch.is_grad_enabled() else grads))

    @staticmethod
    def _gradients(ctx: Any, tensors: deque[Tensor], tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        executable: Executable = ctx.executable
        if not torch._C._autograd._get_current_graph_task_keep_graph():  # pyright: ignore
            ctx.maybe_clear_saved_tensors()
        saved = [[tensors.popleft() if value is None else value[0] for value in kept] for kept in ctx.kept]
        arrived = {
            slot.index: tangent
            for slot, tangent in zip(executable.outputs, tangents, strict=True)
            if tangent is not None
        }
        uncovered = arrived.keys() - {slot.index for slot in executable.tangents}
        if not uncovered:
            gradients = executable._backward(saved, arrived, ctx.sums, ctx.leaves)  # pyright: ignore[reportPrivateUsage]
        elif ctx.fallback is None:
            raise RankError(
                f"output {min(uncovered)} got a gradient, but the module's backward starts only from the outputs "
                f"{sorted(slot.index for slot in executable.tangents)}: detach the others"
            )
        elif getattr(executable.module, "RANDOM", False) == INDEPENDENT:
            raise RankError(
                f"output {min(uncovered)} got a gradient, but backward starts only from the outputs "
                f"{sorted(slot.index for slot in executable.tangents)}, and another program would draw other random "
                "numbers than the forward that ran: detach it, or compile with randomness='exact'"
            )
        else:
            rest = [name for name in ctx.names if name not in ctx.before]
            values = {**ctx.before, **dict(zip(rest, tensors, strict=True))}
            with ctx.surroundings.again():
                other = ctx.fallback(frozenset(arrived))
            gradients = _again(other, values, arrived, ctx.random_state)
        needs = zip(ctx.names, ctx.needs_input_grad[2:], strict=True)
        grads = [gradients.get(name) if need else None for name, need in needs]
        return list(map(executable.boundary.hand_over, grads, ctx.kinds))  # pyright: ignore


def mutations_of(executable: Executable) -> list[str]:
    """The names of the buffers that a run changes and also reads."""
    return [slot.name for slot in executable.inputs if slot.name in executable.mutated]


def _again(
    executable: Executable, values: Mapping[str, Tensor], tangents: Mapping[int, Tensor], state: Tensor | None
) -> dict[str, Tensor]:
    """Gradients by another executable: its forward from the original values and random state, then its backward."""
    missing = tangents.keys() - {slot.index for slot in executable.tangents}
    if missing:
        raise RankError(f"the backward of the fallback does not start from output {min(missing)} either")
    before = torch.get_rng_state()
    if state is not None:
        torch.set_rng_state(state)
    try:
        result = executable._forward(values)  # pyright: ignore[reportPrivateUsage]
    finally:
        torch.set_rng_state(before)
    return executable._backward([[*saved] for saved in result.saved], tangents, None, {})  # pyright: ignore[reportPrivateUsage]
