"""The run of the model in which torch's tracer records it: the model as a function of tensors, and what came out.

    model(ids, mask=None)    ->    f(w, b, ids) -> (loss, b_new)     plus: where each argument and output belongs

Nothing is computed and nothing is allocated: the tensors are fake ones on the CPU, whatever those of the model are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from shardc.capture.inputs import flatten, refuse_opaque, refuse_unplain
from shardc.capture.skipped_layers import Watch
from shardc.capture.state import State, StateEntry, registry
from shardc.capture.torch_patches.aot_autograd import joint_graph
from shardc.capture.torch_patches.fake_tensors import fake_dynamic, fake_like, fake_mode, require_equal
from shardc.capture.torch_patches.module_internals import refresh_flat_weights
from shardc.capture.torch_patches.provenance_mode import Provenance
from shardc.capture.torch_patches.tracing_flags import tracing_flags
from shardc.capture.trace_errors import explained
from shardc.errors import CaptureError, ConstraintError, ShardcError
from shardc.ir.constrain import Spec, check, constrain, parse, recording, serialise
from shardc.ir.program import Constant, Port, Role


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
        hooks: bool,
        dynamic: Mapping[int, Mapping[int, str]],
        watch: Watch | None,
    ) -> None:
        self.watch = watch
        self.state, self.grad, self.differentiable = state, grad, differentiable
        self.call: Callable[..., Any] = state.module if hooks else state.module.forward
        self.constraints = [(pattern, serialise(spec)) for pattern, spec in constraints.items()]
        self.mode = fake_mode(bool(dynamic))
        self.leaves, self.in_spec = flatten((args, kwargs))
        refuse_unplain(self.leaves)
        refuse_opaque(self.leaves)
        self.slots = state.slots(self._fake)
        self.slots += [
            StateEntry(Port(Role.INPUT, f"input:{index}", index), self._fake(leaf, dynamic.get(index, ()), index))
            for index, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor)
        ]
        hidden = watch.hidden() if watch else set[nn.Module]()
        self.visible_slots = [slot for slot in self.slots if not any(part in hidden for part, _ in slot.owners)]
        self.hides = len(self.visible_slots) < len(self.slots)
        self._tie(dynamic)
        self.out_spec: pytree.TreeSpec | None = None
        self.out_leaves: list[int | Constant] = []
        self.attached: set[int] = set()
        self.met: set[str] = set()
        self.provenance = Provenance(state.module, self._constrained)

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
            stack.enter_context(recording())
            stack.enter_context(self.provenance.tracking())
            try:
                return joint_graph(stack, self._function, fakes)
            except ShardcError:
                raise
            except Exception as error:
                raise explained(error, self.provenance.stack[-1]) from error

    def _function(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The model as a function of the tensors in `visible_slots`, in their order, with flat outputs."""
        leaves = list(self.leaves)
        with self.state.unchanged():
            tensor_of = {slot.port: tensor for slot, tensor in zip(self.visible_slots, tensors, strict=True)}
            for slot in self.slots:
                if slot.port.role is Role.INPUT:
                    leaves[slot.port.index] = tensor_of[slot.port]
                for part, key in slot.owners:
                    registry(part, slot.port.role)[key] = tensor_of.get(slot.port, slot.fake)
            refresh_flat_weights(self.state.module)
            args, kwargs = pytree.tree_unflatten(leaves, self.in_spec)
            with self.provenance, self.watch.installed() if self.watch else nullcontext():
                output = self.call(*args, **kwargs)
            self._write_back(tensors)
        return self._flat_outputs(output)

    def _write_back(self, tensors: Sequence[Tensor]) -> None:
        """Write into a buffer what the model assigned to it, so that the tracer sees a mutation."""
        for slot, tensor in zip(self.visible_slots, tensors, strict=True):
            if slot.port.role is Role.BUFFER:
                part, key = slot.owners[0]
                now = registry(part, Role.BUFFER).get(key)
                if now is not tensor:
                    if now is None or now.shape != tensor.shape or now.dtype != tensor.dtype:
                        raise CaptureError(
                            f"the model replaces its buffer {slot.port.name} by {_brief(now)}, but it was "
                            f"{_brief(tensor)}; a buffer must keep its shape and dtype"
                        )
                    tensor.copy_(now.detach())

    def _flat_outputs(self, output: Any) -> tuple[Tensor, ...]:
        leaves, self.out_spec = flatten(output)
        chosen = self._differentiable(leaves)
        positions: dict[tuple[int, bool], int] = {}
        tensors: list[Tensor] = []
        self.out_leaves, self.attached = [], set[int]()
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                self.out_leaves.append(Constant(leaf))
                continue
            key = (id(leaf), index in chosen)
            if key not in positions:
                positions[key] = len(tensors)
                # A copy, so that no output is a view of an input or of another; the rewriter drops it again.
                tensors.append((leaf if index in chosen else leaf.detach()).clone())
            self.out_leaves.append(positions[key])
            if leaf.requires_grad:
                self.attached.add(positions[key])
        return tuple(tensors)

    def _differentiable(self, leaves: list[Any]) -> frozenset[int]:
        able = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad}
        if self.differentiable is None:
            return frozenset(i for i, leaf in able.items() if leaf.ndim == 0) or frozenset(able)
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


def _brief(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"a tensor of shape {tuple(tensor.shape)} and {tensor.dtype}"
