"""The run of the model in which torch's tracer records it: the model as a function of tensors, and what came out.

    model(ids, mask=None)    ->    f(w, b, ids) -> (loss, b_new)     plus: where each argument and output belongs

Nothing is computed and nothing is allocated: the tensors are fake ones on the CPU, whatever those of the model are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from shardc.capture.inputs import flatten, refuse_unplain
from shardc.capture.side_effects.arguments import Way, passed_objects
from shardc.capture.side_effects.escapes import Escapes
from shardc.capture.side_effects.files import Files
from shardc.capture.side_effects.guards import Guards
from shardc.capture.side_effects.holders import Holder, Location
from shardc.capture.side_effects.random_states import Generators, Seeds
from shardc.capture.side_effects.recorded import (
    RecordedEffects,
    Watched,
    effects_of,
    live_holders,
    refuse_new_parameters,
)
from shardc.capture.side_effects.replay import (
    Copied,
    Describer,
    Given,
    Kept,
    Passed,
    ProgramResult,
    Recipe,
    SideEffect,
    Standing,
    holds_tensors,
)
from shardc.capture.side_effects.snapshot import Change
from shardc.capture.side_effects.stand_ins import Counter, StandInCandidate, StandIns, candidates
from shardc.capture.skipped_layers import Watch
from shardc.capture.state import State, StateEntry, registry
from shardc.capture.torch_patches.aot_autograd import joint_graph
from shardc.capture.torch_patches.fake_tensors import fake_dynamic, fake_like, fake_mode, is_traced, require_equal
from shardc.capture.torch_patches.provenance_mode import Provenance
from shardc.capture.torch_patches.tracing_flags import tracing_flags
from shardc.capture.torch_patches.written_attention import Recognition
from shardc.capture.trace_errors import explained
from shardc.errors import CaptureError, ConstraintError, ShardcError
from shardc.ir.constrain import Spec, check, constrain, parse, recording, serialise
from shardc.ir.program import Constant, Made, Port, Role


class ModelTrace:
    """One run of the tracer: the arguments, the function that it traces, and what the function noted.

    `slots` are all tensors of the model and all inputs; `visible_slots` are those that are arguments of the traced
    function, which the tensors of skipped layers are not (`hides`). `out_leaves`, `out_spec` and `attached` describe
    the outputs of the model, `met` the patterns of constraints that named a module that ran.
    """

    def __init__(
        self,
        state: State,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        grad: bool,
        differentiable: frozenset[int] | None,
        constraints: dict[str, Spec],
        function: Callable[..., Any],
        dynamic: Mapping[int, Mapping[int, str]],
        watch: Watch | None,
        stand_ins: StandIns | None,
        recognition: Recognition,
    ) -> None:
        self.watch, self.stand_ins, self.recognition = watch, stand_ins, recognition
        self.candidates: list[StandInCandidate] = []
        """What the model changes so that stand-ins could take its part in another trace."""
        self.state, self.grad, self.differentiable = state, grad, differentiable
        self.call = function
        self.constraints = [(pattern, serialise(spec)) for pattern, spec in constraints.items()]
        self.mode = fake_mode(bool(dynamic))
        self.leaves, self.in_spec = flatten((args, kwargs))
        refuse_unplain(self.leaves)
        self.slots = state.slots(self._fake)
        self.slots += [
            StateEntry(Port(Role.INPUT, f"input:{index}", index), self._fake(leaf, dynamic.get(index, ()), index))
            for index, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor)
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
        self._tie(dynamic)
        self.out_spec: pytree.TreeSpec | None = None
        self.out_leaves: list[int | Constant | Made] = []
        self.effects: tuple[SideEffect, ...] = ()
        self.seed: Tensor | None = None
        self.attached: set[int] = set()
        self.met: set[str] = set()
        self.escapes = Escapes()
        self.provenance = Provenance(state.module, self._constrained, self.escapes.note, recognition, stand_ins)

    def _fake(self, tensor: Tensor, dims: Iterable[int] = (), index: int = 0) -> Tensor:
        symbolic = fake_dynamic(self.mode, tensor, dims, f"input:{index}") if dims else None
        fake = fake_like(self.mode, tensor) if symbolic is None else symbolic
        return fake.requires_grad_(self.grad and tensor.requires_grad)

    def _tie(self, dynamic: Mapping[int, Mapping[int, str]]) -> None:
        """Let all dims of one name have one symbol."""
        fakes = {slot.port.index: slot.fake for slot in self.slots if slot.port.role is Role.INPUT}
        first: dict[str, Any] = {}
        for index, dims in dynamic.items():
            for dim, name in dims.items():
                size = fakes[index].shape[dim]
                require_equal(first.setdefault(name, size), size)

    def run(self) -> fx.GraphModule:
        """The traced graph. Raises CaptureError for whatever goes wrong in torch or in the model."""
        fakes = [slot.fake for slot in self.visible_slots]
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            stack.enter_context(tracing_flags(self.state.module))
            stack.enter_context(self.state.traced())
            stack.enter_context(recording())
            stack.enter_context(self.provenance.tracking())
            try:
                traced = joint_graph(stack, self._function, fakes)
                self._check_backward()
            except ShardcError:
                raise
            except Exception as error:
                raise explained(error, self.provenance.stack[-1]) from error
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
                for place in slot.places:
                    place.set(tensor_of.get(slot.port, slot.fake))
            self.state.uncache()
            self.state.stop_iterators()
            if self.stand_ins:
                self.stand_ins.put()
            args, kwargs = pytree.tree_unflatten(leaves, self.in_spec)
            watched = Watched(self.state.reachable, (args, kwargs))
            output = self._called(args, kwargs)
            changes = watched.changes(self._is_buffer)
            if changes and self.watch:
                self.watch.refuse("the model leaves something behind")
            refuse_new_parameters(changes)
            self.candidates = candidates(changes)
            self._write_back(tensors)
            return self._flat_outputs(output, changes, tensors, passed_objects((args, kwargs)))

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns; notes the state in which it leaves torch's generator."""
        self.provenance.seeds = seeds = Seeds()
        generators = Generators(self.state.reachable.generators)
        files, switches = Files(), _switches()
        self.provenance.asked = None
        try:
            with self.provenance, seeds.watched(), files, self.watch.installed() if self.watch else nullcontext():
                output = self.call(*args, **kwargs)
        except BaseException:
            generators.restore()
            raise
        if self.provenance.asked is not None:
            raise explained(self.provenance.asked, "")
        _refuse_switched(switches)
        files.refuse()
        generators.refuse_draws(lambda: self.call(*args, **kwargs))
        self.seed = torch.get_rng_state() if seeds.seeded else None
        torch.set_rng_state(seeds.start)
        return output

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

    def _flat_outputs(
        self, output: Any, changes: list[Change], tensors: Sequence[Tensor], passed: Mapping[int, Way]
    ) -> tuple[Tensor, ...]:
        """The tensors among the outputs and among what the model leaves behind; notes what is made of them."""
        slots = {id(tensor): slot for slot, tensor in zip(self.visible_slots, tensors, strict=True)}
        if isinstance(output, Iterator):
            raise CaptureError(
                f"forward returns a {type(output).__name__}, which runs the model's code later: return a list"
            )
        leaves, self.out_spec = flatten(output, passed)
        positions: dict[int, int] = {}

        def described(tensor: Tensor) -> Recipe:
            slot = slots.get(id(tensor))
            if slot is not None:
                return Given(slot.port.index) if slot.port.role is Role.INPUT else Standing(slot.places[0])
            if not is_traced(tensor):
                return Kept(tensor) if self.state.reachable.holds(tensor) else Copied(tensor)
            if id(tensor) not in positions:
                positions[id(tensor)] = len(leaves)
                leaves.append(tensor)
            return ProgramResult(positions[id(tensor)])

        describer = Describer(described, self.state.reachable.holds)
        made: dict[int, Recipe] = {}
        for index, leaf in enumerate(list(leaves)):
            if isinstance(leaf, Tensor):
                positions.setdefault(id(leaf), index)
                if id(leaf) in slots or not is_traced(leaf):
                    made[index] = described(leaf)
            elif id(leaf) in passed:
                made[index] = Passed(passed[id(leaf)])
                leaves[index] = None
            elif type(leaf) is Counter or holds_tensors(leaf):
                made[index] = describer.describe(leaf)
        self.effects = effects_of(changes, describer, self.stand_ins)
        return self._chosen_outputs(leaves, made)

    def _chosen_outputs(self, leaves: list[Any], made: Mapping[int, Recipe]) -> tuple[Tensor, ...]:
        chosen = self._differentiable(leaves, made)
        known: dict[tuple[int, bool], int] = {}
        tensors: list[Tensor] = []
        self.out_leaves, self.attached = [], set[int]()
        for index, leaf in enumerate(leaves):
            if index in made or not isinstance(leaf, Tensor):
                self.out_leaves.append(made.get(index) or Constant(leaf))
                continue
            key = (id(leaf), index in chosen)
            if key not in known:
                known[key] = len(tensors)
                # A copy, so that no output is a view of an input or of another; the rewriter drops it again.
                tensors.append((leaf if index in chosen else leaf.detach()).clone())
            self.out_leaves.append(known[key])
            if leaf.requires_grad:
                self.attached.add(known[key])
        return tuple(tensors)

    def _differentiable(self, leaves: list[Any], made: Mapping[int, Recipe]) -> frozenset[int]:
        assert self.out_spec is not None
        able = {
            i: leaf
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.requires_grad and i not in made
        }
        if self.differentiable is None:
            scalars = frozenset(i for i, leaf in able.items() if leaf.ndim == 0)
            returned = frozenset(i for i in able if i < self.out_spec.num_leaves)
            return scalars | (frozenset() if returned & scalars else returned) or frozenset(able)
        wrong = sorted(self.differentiable - able.keys()) if self.grad else []
        if wrong:
            raise CaptureError(
                f"differentiable={sorted(self.differentiable)}: output {wrong[0]} does not require a gradient; "
                f"of the {len(leaves)} flat outputs these do: {sorted(able)}"
            )
        return self.differentiable & able.keys()

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
            if isinstance(leaf, Tensor):
                yield f"input:{index}", leaf

    def recorded(self, standing: Mapping[str, Location]) -> RecordedEffects:
        """What the program does beside computing, and under which conditions it is that of a call."""
        live = live_holders(self.effects, (place.holder for place in standing.values()))
        contents, names = self.state.before.contents(), self.state.reachable.names
        guards = Guards(contents, names, self.effects, live, self.stand_ins)
        return RecordedEffects(guards, self.effects, tuple(self.stand_ins.numbers) if self.stand_ins else (), self.seed)

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
