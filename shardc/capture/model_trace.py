"""The run of the model in which torch's tracer records it: the model as a function of tensors, and what came out.

    model(ids, mask=None)    ->    f(w, b, ids) -> (loss, b_new)     plus: where each argument and output belongs

Nothing is computed and nothing is allocated: the tensors are fake ones on the CPU, whatever those of the model are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from shardc.capture.changing_sizes import Longer
from shardc.capture.experts.written import Changed, WrittenExperts
from shardc.capture.guards.guards import Guards
from shardc.capture.inputs import flatten, refuse_unplain
from shardc.capture.precision import cast_outputs, retyped
from shardc.capture.side_effects.arguments import Containers, passed_containers
from shardc.capture.side_effects.cached_functions import uncache
from shardc.capture.side_effects.escapes import Escapes
from shardc.capture.side_effects.files import Files
from shardc.capture.side_effects.holders import Holder, Location
from shardc.capture.side_effects.messages import Messages
from shardc.capture.side_effects.random_states import Generators, Seeds
from shardc.capture.side_effects.readings import asked_anew
from shardc.capture.side_effects.recorded import (
    RecordedEffects,
    Watched,
    live_holders,
    own_arguments,
    refuse_new_parameters,
)
from shardc.capture.side_effects.stand_ins import ChangesAtEveryCall, StandIns, candidates
from shardc.capture.side_effects.state_values import StateValues
from shardc.capture.side_effects.tensor_facts import TensorFacts
from shardc.capture.side_effects.types_asked import answer_types
from shardc.capture.skipped_layers import Watch
from shardc.capture.state import State, StateEntry, registry
from shardc.capture.torch_patches.aot_autograd import joint_graph
from shardc.capture.torch_patches.attention.written import Recognition
from shardc.capture.torch_patches.compiling_flag import CompilingFlag
from shardc.capture.torch_patches.fake_tensors import (
    attributes_noted,
    fake_dynamic,
    fake_like,
    fake_mode,
    fake_number,
    is_data_dependent,
    require_equal,
)
from shardc.capture.torch_patches.provenance_mode import Provenance
from shardc.capture.torch_patches.symbols import spelled_out
from shardc.capture.torch_patches.tracing_flags import tracing_flags
from shardc.capture.trace_errors import explained, is_of_model
from shardc.capture.traced_outputs import TracedOutputs
from shardc.errors import CaptureError, ConstraintError, ShardcError
from shardc.ir.constrain import Spec, check, constrain, parse, recording, serialise
from shardc.ir.precision import Precision
from shardc.ir.program import Port, Role

_GIVEN = (Role.INPUT, Role.NUMBER)


class ModelTrace:
    """One run of the tracer: the arguments, the function that it traces, and what the function noted.

    `slots` are all tensors of the model and all inputs; `visible_slots` are those that are arguments of the traced
    function, which the tensors of skipped layers are not (`hides`). `outputs` is what came out, `met` the patterns of
    constraints that named a module that ran. Without `stand_ins`, even none, the run ends where they could stand.
    """

    def __init__(
        self,
        state: State,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        grad: tuple[bool, bool],
        differentiable: frozenset[int] | None,
        constraints: dict[str, Spec],
        function: Callable[..., Any],
        dynamic: Mapping[int, Mapping[int, str]],
        watch: Watch | None,
        stand_ins: StandIns | None,
        compiling: CompilingFlag,
        recognition: Recognition,
        experts: WrittenExperts,
        precision: Precision,
    ) -> None:
        self._compiling, self.precision = compiling, precision
        self.watch, self.stand_ins, self.recognition, self.experts = watch, stand_ins, recognition, experts
        self.state, (self.grad, self._called_with_grad) = state, grad
        self.call = function
        self.constraints = [(pattern, serialise(spec)) for pattern, spec in constraints.items()]
        self.mode = fake_mode(bool(dynamic))
        self._arguments, self._containers = (args, kwargs), Containers((args, kwargs))
        self.own = self._containers.own(state.reachable.holds)
        self.leaves, self.in_spec = flatten((args, kwargs))
        refuse_unplain(self.leaves)
        self.slots = state.slots(self._fake_state)
        self.slots += [
            StateEntry(Port(Role.INPUT, f"input:{index}", index), self._fake_input(leaf, dynamic.get(index, ()), index))
            for index, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor)
        ]
        self.slots += [
            StateEntry(Port(Role.NUMBER, f"input:{index}", index), fake_number(self.mode, leaf, f"input:{index}"))
            for index, leaf in enumerate(self.leaves)
            if index in dynamic and not isinstance(leaf, Tensor)
        ]
        hidden = watch.hidden() if watch else set[nn.Module]()
        self.visible_slots = [slot for slot in self.slots if not any(part in hidden for part, _ in slot.owners)]
        self.hides = len(self.visible_slots) < len(self.slots)
        self._buffers = {
            (id(registry(part, Role.BUFFER)), key): slot.fake
            for slot in self.visible_slots
            if slot.port.role is Role.BUFFER
            for part, key in slot.owners
        }
        inputs = [slot.port for slot in self.slots if slot.port.role is Role.INPUT]
        ports = {id(self.leaves[port.index]): port for port in reversed(inputs)}
        ports |= {key: Port(role, name) for key, (role, name) in state.names.items()}
        self._one_tensor = {
            i: ports[id(leaf)] for i, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor) and ports[id(leaf)] != Port(Role.INPUT, f"input:{i}", i)
        }  # fmt: skip
        """Inputs that are the same tensor as an input before, or as one of the model's: the port of that."""
        self._tie(dynamic)
        self.outputs = TracedOutputs(self.grad, differentiable, state.reachable.holds, lambda x: experts.rows.refuse(x))
        self.seed: Tensor | None = None
        self.messages = Messages()
        self._raised: BaseException | None = None
        """What has left the model's code."""
        self.met: set[str] = set()
        self.escapes = Escapes()
        self._facts = TensorFacts()
        self.values = StateValues(self._value_asked)
        self.provenance = Provenance(
            state.module, self._constrained, self.escapes.note, self._facts.answer, recognition, experts, self.values,
            stand_ins,
        )  # fmt: skip

    def _fake_state(self, tensor: Tensor) -> Tensor:
        of_parameter = self.state.names[id(tensor)][0] is Role.PARAMETER
        used = retyped(tensor, self.precision.of_parameter(tensor.dtype)) if of_parameter else tensor
        return fake_like(self.mode, used).requires_grad_(tensor.requires_grad)

    def _fake_input(self, tensor: Tensor, dims: Iterable[int], index: int) -> Tensor:
        used = retyped(tensor, self.precision.of_input(tensor.dtype))
        fake = fake_dynamic(self.mode, used, dims, f"input:{index}") if dims else fake_like(self.mode, used)
        return fake.requires_grad_(tensor.requires_grad)

    def _tie(self, dynamic: Mapping[int, Mapping[int, str]]) -> None:
        """Let all dims of one name have one symbol, and what is longer than others that of these and a number."""
        fakes = {slot.port.index: slot.fake for slot in self.slots if slot.port.role in _GIVEN}
        first: dict[str, Any] = {}
        for index, dims in dynamic.items():
            for dim, name in dims.items():
                size = fakes[index].shape[dim]
                require_equal(first.setdefault(name, size), size)
        for name, size in first.items():
            if isinstance(name, Longer):
                require_equal(first[name.name] + name.more, size)

    def run(self) -> fx.GraphModule:
        """The traced graph. Raises CaptureError for whatever goes wrong in torch or in the model."""
        fakes, handled = [slot.fake for slot in self.visible_slots], sys.exception()
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            stack.enter_context(tracing_flags(self.state.module, self._compiling))
            stack.enter_context(self.provenance.tracking())
            stack.enter_context(self.state.traced())
            stack.enter_context(recording())
            stack.enter_context(spelled_out())
            stack.enter_context(attributes_noted(self._facts.attribute_set))
            try:
                traced = joint_graph(stack, self._function, fakes)
                self._check_backward()
            except (ShardcError, Changed, ChangesAtEveryCall):
                raise
            except Exception as error:
                asked = None if is_data_dependent(error) else self.provenance.asked
                told = asked or error  # code may have caught what was raised, and raised something else
                by_model = told is self._raised and is_of_model(told, handled)
                raise explained(told, self.provenance.stack[-1], by_model=by_model) from error
        self.escapes.check()
        return traced

    def _check_backward(self) -> None:
        """Raise CaptureError for what hooks have changed while the gradients were traced."""
        changes = self.state.left()
        if changes:
            raise CaptureError(
                f"backward changes {', '.join(changes[0].names())}: a hook there runs while gradients are computed, "
                "and a compiled backward runs no Python. Take the hook off, or do its work after backward()"
            )

    def _function(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The model as a function of the tensors in `visible_slots`, in their order, with flat outputs."""
        leaves = list(self.leaves)
        with self.state.unchanged():
            tensor_of = {slot.port: tensor for slot, tensor in zip(self.visible_slots, tensors, strict=True)}
            for slot in self.slots:
                if slot.port.role is Role.INPUT:
                    leaves[slot.port.index] = tensor_of[slot.port]
                elif slot.port.role is Role.NUMBER:
                    leaves[slot.port.index] = tensor_of[slot.port].shape[0]
            for index, port in self._one_tensor.items():
                leaves[index] = tensor_of.get(port, leaves[index])
            for slot in self.slots:
                for place in slot.places:
                    place.set(tensor_of.get(slot.port, slot.fake))
            users = dict(self.tensors())
            for slot in self.slots:
                if slot.port.name in users:
                    self._facts.dress(slot.port.name, tensor_of.get(slot.port, slot.fake), users[slot.port.name])
            self.values.begin(
                (tensor_of.get(slot.port, slot.fake), users[slot.port.name], _place(slot))
                for slot in self.slots
                if slot.port.name in users
            )
            self.messages = Messages()
            reachable = self.state.reachable
            uncache(reachable.cached, reachable.holders, self.messages.told_once)
            self.state.stop_iterators()
            answer_types(self.state.reachable.holders)
            if self.stand_ins:
                self.stand_ins.put()
            args, kwargs = self._with_leaves(leaves)
            watched = Watched(self.state.reachable, (args, kwargs))
            ways = passed_containers((args, kwargs))  # without what forward puts into the arguments
            with torch.set_grad_enabled(self._called_with_grad):
                output = cast_outputs(self._called(args, kwargs), self.precision.outputs)
            self._facts.undress()
            self.values.end()
            changes = watched.changes(self._is_buffer)
            if (changes or self.messages.noted) and self.watch:
                self.watch.refuse("the model leaves something behind")
            refuse_new_parameters(changes)
            if self.stand_ins is None:
                places = self.state.reachable.places
                chosen = candidates(changes, self.state.reachable.holders, self.state.changing)
                if StandIns(chosen, places, set()):
                    raise ChangesAtEveryCall(chosen, places)
            self._write_back(tensors)
            pairs = zip(self.visible_slots, tensors, strict=True)
            users = dict(self.tensors())
            slots = {  # of a tensor in another type the model has a copy
                id(tensor): slot for slot, tensor in pairs
                if slot.port.name not in users or users[slot.port.name].dtype == slot.fake.dtype
            }  # fmt: skip
            flat = self.outputs.flat(output, changes, slots, (args, kwargs), ways, self.stand_ins, self.messages.noted)
            self.messages.noted.clear()
            if self.outputs.attached and torch.is_inference_mode_enabled():
                raise CaptureError(
                    "forward leaves inference mode and returns, or keeps, what requires a gradient, but a sharded "
                    "model runs in the mode of its call: call it under torch.no_grad(), not torch.inference_mode()"
                )
            self.experts.end()
            return flat

    def _with_leaves(self, leaves: list[Any]) -> Any:
        """The arguments with other leaves. Containers are new ones, and one where those of the call are."""
        if self._containers.again or self.own:
            return self._containers.copied(self._arguments, self.leaves, leaves, self.own)
        return pytree.tree_unflatten(leaves, self.in_spec)

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns; notes the state in which it leaves torch's generator."""
        self.provenance.seeds = seeds = Seeds()
        generators = Generators(self.state.reachable.generators)
        files, switches = Files(), _switches()
        self.provenance.asked, self.provenance.computed = None, False
        try:
            with (
                self.provenance,
                seeds.watched(),
                files,
                asked_anew(self.state.reachable, lambda: self.provenance.computed),
                self.messages.noting(self.state.reachable),
                self.watch.installed() if self.watch else nullcontext(),
            ):
                output = self.call(*args, **kwargs)
        except BaseException as error:
            self._raised = error
            generators.restore()
            raise
        if self.provenance.asked is not None:
            raise explained(self.provenance.asked, "")
        self.experts.rows.refuse_written()
        _refuse_switched(switches)
        files.refuse()
        generators.refuse_draws(lambda: self.call(*args, **kwargs))
        self.seed = torch.get_rng_state() if seeds.seeded else None
        torch.set_rng_state(seeds.start)
        return output

    def _value_asked(self) -> None:
        if self.watch:
            self.watch.refuse("the model asks for the values of its tensors")

    def _is_buffer(self, holder: Holder, key: Any) -> bool:
        """Whether a change is one of a buffer to a value of its own form, which `_write_back` makes."""
        entry = self._buffers.get((id(holder.target), key))
        now = holder.get().get(key)
        return entry is not None and now is not None and now.shape == entry.shape and now.dtype == entry.dtype

    def _write_back(self, tensors: Sequence[Tensor]) -> None:
        """Write into a buffer what the model assigned to it, so that the tracer sees a mutation. A value of another
        form is left behind as any other is."""
        for slot, tensor in zip(self.visible_slots, tensors, strict=True):
            if slot.port.role is Role.BUFFER:
                part, key = slot.owners[0]
                now = registry(part, Role.BUFFER).get(key)
                if now is not None and now is not tensor and now.shape == tensor.shape and now.dtype == tensor.dtype:
                    tensor.copy_(now.detach())

    def _constrained(self, path: str, output: Any) -> Any:
        """Forward hook: put the constraints of a module on the tensors it returns."""
        specs = [(pattern, text) for pattern, text in self.constraints if fnmatchcase(path, pattern)]
        if not specs:
            return None
        leaves, spec = flatten(output)
        for pattern, text in specs:
            rank = len(parse(text))
            several = sum(isinstance(leaf, Tensor) for leaf in leaves) > 1
            fits = [isinstance(leaf, Tensor) and (leaf.ndim == rank or not several) for leaf in leaves]
            if several and not any(fits):
                first = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
                check(text, first.ndim, f"constraint on {path or 'the model'}")
            for index, leaf in enumerate(leaves):
                if fits[index]:
                    check(text, leaf.ndim, f"constraint on {path or 'the model'}")
                    leaves[index] = constrain(leaf, text)
                    self.met.add(pattern)
        return pytree.tree_unflatten(leaves, spec)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The user's tensors of the call by the names of their ports."""
        for key, (_, name) in self.state.names.items():
            yield name, self.state.tensors[key]
        for index, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor) and index not in self._one_tensor:
                yield f"input:{index}", leaf

    def recorded(self, standing: Mapping[str, Location]) -> RecordedEffects:
        """What the program does beside computing, and under which conditions it is that of a call."""
        live = live_holders(self.outputs.effects, (place.holder for place in standing.values()))
        contents, names = self.state.contents(), self.state.reachable.names
        guards = Guards(contents, names, self.outputs.effects, live, self.stand_ins, self.values.found)
        numbers = tuple(self.stand_ins.numbers) if self.stand_ins else ()
        own = own_arguments(guards, self._containers)
        return RecordedEffects(
            guards, own, self.outputs.effects, numbers, self.seed, self.outputs.returned, self.outputs.marks,
            messages=self.outputs.messages, early=self.outputs.early,
        )  # fmt: skip

    def check_met(self) -> None:
        """Raise ConstraintError for a pattern that names modules only, none of which ran and returned a tensor."""
        named = [*self.state.tied, *(name for _, name in self.state.names.values())]
        for pattern, _ in self.constraints:
            if pattern not in self.met and not any(fnmatchcase(name, pattern) for name in named):
                paths = [path for path, _ in self.state.module.named_modules() if fnmatchcase(path, pattern)]
                raise ConstraintError(
                    f"constraint {pattern!r} has no effect: {', '.join(paths[:3])} never runs in this call, or returns "
                    f"no tensor. Constrain parameters ({paths[0]}.weight), or a value in the code with shardc.constrain"
                )


def _place(slot: StateEntry) -> Location | None:
    """Where a tensor of the model stands that no optimizer changes."""
    return slot.places[0] if slot.port.role in (Role.BUFFER, Role.CONSTANT) and slot.places else None


def _switches() -> tuple[Any, ...]:
    """Global switches of torch that code may set."""
    return torch.is_grad_enabled(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()


def _refuse_switched(before: tuple[Any, ...]) -> None:
    """Raise CaptureError if forward has left a switch as it was not, and set it back."""
    now = _switches()
    if now != before:
        torch.set_grad_enabled(before[0])
        torch.set_default_dtype(before[1])
        torch.use_deterministic_algorithms(before[2])
        raise CaptureError(
            f"forward leaves a switch of torch as it was not: (gradients, default dtype, deterministic) are {now}, and "
            f"were {before}. Set it outside of the model, or for a part of forward, with a context manager"
        )
