"""Capture: a module and example inputs become a `Program`, the joint forward and backward graph in ATen.

Nothing is computed and nothing is allocated: the model runs on fake CPU tensors, so models on the meta device and
models larger than memory are captured as they are, and the model itself stays untouched.
"""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from shardc.capture import canonical, provenance
from shardc.capture.inputs import flatten, refuse_foreign, refuse_opaque, refuse_sparse
from shardc.capture.repeated_layers import Repeat, Unlike, find, form
from shardc.capture.skipped_layers import Watch
from shardc.capture.state import State, StateEntry, registry
from shardc.capture.stitch import fill
from shardc.capture.torch_patches import tracing
from shardc.errors import CaptureError, ConstraintError, ShardcError
from shardc.ir.constrain import Spec, check, constrain, parse, recording, serialise
from shardc.ir.program import Constant, Port, Program, Role
from shardc.ir.versions import GraphVersion


def capture(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    grad: bool = True,
    differentiable: frozenset[int] | None = None,
    constraints: Mapping[str, Spec] | None = None,
    hooks: bool = True,
    dynamic: Mapping[int, Mapping[int, str]] | None = None,
) -> Program:
    """The program that `module(*args, **kwargs)` runs, and its backward.

    `grad=False` captures the forward alone. `differentiable` says which of the flat outputs get a tangent; by default
    every scalar that requires a gradient (a loss), or, without one, every floating output that does. `constraints`
    maps patterns of module paths to specs, which `shardc.constrain` then puts on the tensors these modules return.
    Tensors among the inputs become graph inputs, numbered as `tree_flatten((args, kwargs))` does; anything else is
    burned in. `hooks=False`: the caller runs the hooks of `module` itself. `dynamic` names dims of flat inputs, whose
    sizes stay symbols in the graph (see shardc.capture.dynamic_sizes).

    Raises CaptureError, ConstraintError, LayoutError.
    """
    given = tuple(args), dict(kwargs or {})

    def traced(watch: Watch | None = None) -> tuple[_Trace, Program]:
        rest = grad, differentiable, dict(constraints or {}), hooks, dynamic or {}, watch
        trace = _Trace(State(module), *given, *rest)
        return trace, _Builder(trace, trace.run()).program()

    repeats = [] if dynamic else find(module, constraints or ())
    trace, program = (_stitched(traced, repeats) if repeats else None) or traced()
    trace.check_met()
    if trace.state.left:
        warnings.warn(
            f"forward leaves something in {', '.join(trace.state.left)}; the compiled program does not, it keeps "
            "buffers only: return the value, or register it with register_buffer",
            stacklevel=2,
        )
    return program


Traced = Callable[..., "tuple[_Trace, Program]"]


def _stitched(traced: Traced, repeats: list[Repeat]) -> tuple[_Trace, Program] | None:
    """A trace that runs only some of the repeated layers, with the others filled in; None if they may not be."""
    watch = Watch(repeats)
    try:
        trace, program = traced(watch)
        for number, repeat in enumerate(repeats):
            program = fill(program, number, repeat)
    except Exception:  # whatever it is: the full trace meets it as well, or works
        return None
    return None if watch.broken else (trace, program)


class _Trace:
    """One run of the tracer: the arguments, the function that it traces, and what the function noted."""

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
        self.mode = tracing.fake_mode(bool(dynamic))
        self.leaves, self.in_spec = flatten((args, kwargs))
        refuse_opaque(self.leaves)
        self.slots = state.slots(self._fake)
        self.slots += [
            StateEntry(Port(Role.INPUT, f"input:{index}", index), self._fake(leaf, dynamic.get(index, ()), index))
            for index, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor)
        ]
        hidden = watch.hidden() if watch else set[nn.Module]()
        self.given = [slot for slot in self.slots if not any(part in hidden for part, _ in slot.places)]
        self.hides = len(self.given) < len(self.slots)
        self._tie(dynamic)
        self.out_spec: pytree.TreeSpec | None = None
        self.out_leaves: list[int | Constant] = []
        self.attached: set[int] = set()
        self.met: set[str] = set()
        self.provenance = tracing.Provenance(state.module, self._constrained)

    def _fake(self, tensor: Tensor, dims: Iterable[int] = (), index: int = 0) -> Tensor:
        given = tracing.fake_dynamic(self.mode, tensor, dims, f"input:{index}") if dims else None
        fake = tracing.fake_like(self.mode, tensor) if given is None else given
        return fake.requires_grad_(self.grad and tensor.requires_grad)

    def _tie(self, dynamic: Mapping[int, Mapping[int, str]]) -> None:
        """Equal names are equal sizes."""
        fakes = {slot.port.index: slot.fake for slot in self.slots if slot.port.role is Role.INPUT}
        first: dict[str, Any] = {}
        for index, dims in dynamic.items():
            for dim, name in dims.items():
                size = fakes[index].shape[dim]
                torch._check(first.setdefault(name, size) == size)

    def run(self) -> fx.GraphModule:
        """Trace; whatever goes wrong becomes a CaptureError."""
        fakes = [slot.fake for slot in self.given]
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            stack.enter_context(tracing.tracing_flags(self.state.module))
            stack.enter_context(recording())
            stack.enter_context(self.provenance.tracking())
            try:
                return tracing.joint_graph(stack, self._function, fakes)
            except ShardcError:
                raise
            except Exception as error:
                raise _explained(error, self.provenance.stack[-1]) from error

    def _function(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The model as a function of its parameters, buffers and inputs, with flat outputs."""
        leaves = list(self.leaves)
        with self.state.unchanged():
            own = {slot.port: tensor for slot, tensor in zip(self.given, tensors, strict=True)}
            for slot in self.slots:
                if slot.port.role is Role.INPUT:
                    leaves[slot.port.index] = own[slot.port]
                for part, key in slot.places:
                    registry(part, slot.port.role)[key] = own.get(slot.port, slot.fake)
            self._refresh_rnns()
            args, kwargs = pytree.tree_unflatten(leaves, self.in_spec)
            with self.provenance, self.watch.installed() if self.watch else nullcontext():
                output = self.call(*args, **kwargs)
            self._write_back(tensors)
        return self._flat_outputs(output)

    def _refresh_rnns(self) -> None:
        """RNNs keep their weights in a list as well; the list must show what was swapped in."""
        for part in self.state.module.modules():
            if isinstance(part, nn.RNNBase):
                part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]

    def _write_back(self, tensors: Sequence[Tensor]) -> None:
        """A buffer that the model replaced by assignment is a mutation, as if it had been written in place."""
        for slot, tensor in zip(self.given, tensors, strict=True):
            if slot.port.role is Role.BUFFER:
                part, key = slot.places[0]
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
        """ConstraintError for a pattern that names modules alone, none of which ran and returned a tensor."""
        named = [*self.state.tied, *(name for _, name in self.state.names.values())]
        for pattern, _ in self.constraints:
            if pattern not in self.met and not any(fnmatchcase(name, pattern) for name in named):
                paths = [path for path, _ in self.state.module.named_modules() if fnmatchcase(path, pattern)]
                raise ConstraintError(
                    f"constraint {pattern!r} has no effect: {', '.join(paths[:3])} never runs in this call, or returns "
                    f"no tensor. Constrain parameters ({paths[0]}.weight), or a value in the code with shardc.constrain"
                )


class _Builder:
    """Makes the Program out of the traced graph: canonical operators, ports, provenance, phases."""

    def __init__(self, trace: _Trace, traced: fx.GraphModule) -> None:
        self.trace, self.traced = trace, traced
        self.rewriter = canonical.Rewriter(provenance.describe)
        self.inputs: list[Port] = []
        self.constants: dict[str, Tensor] = {}

    def program(self) -> Program:
        graph = self.traced.graph
        ports, values = self._results()
        nodes = canonical.live(graph, values)
        self._placeholders(nodes)
        provenance.locate(nodes, provenance.by_sequence(graph))
        refuse_sparse(nodes)
        self.rewriter.copy(nodes)
        results = [None if value is None else self.rewriter.env[value] for value in values]
        new = self.rewriter.finish(results)
        made: Any = new.output_node().args[0]
        provenance.mark_phases(new, [r for r, port in zip(made, ports, strict=True) if port.role is not Role.GRADIENT])
        assert self.trace.out_spec is not None
        return Program(
            GraphVersion.of(new),
            self.inputs,
            ports,
            self.trace.out_spec,
            self.trace.out_leaves,
            constants=self.constants,
            tied=dict(self.trace.state.tied),
            attached=frozenset(self.trace.attached),
        )

    def _results(self) -> tuple[list[Port], list[fx.Node | None]]:
        """Outputs, then mutations, then gradients, with their ports."""
        roles = (Role.OUTPUT, Role.MUTATION, Role.GRADIENT)
        found: dict[Role, list[tuple[Port, fx.Node | None]]] = {role: [] for role in roles}
        graph, gradients = self.traced.graph, dict[Port, fx.Node | None]()
        for (kind, index), value in zip(
            tracing.output_kinds(graph), pytree.tree_leaves(graph.output_node().args), strict=True
        ):
            if kind == "output":
                found[Role.OUTPUT].append((Port(Role.OUTPUT, "", index), _uncloned(value)))
            elif kind:
                source, role = self.trace.given[index], Role(kind)
                if role is Role.GRADIENT:
                    gradients[source.port] = value
                else:
                    found[role].append((Port(role, source.port.name, source.port.index), value))
        for slot in self.trace.slots:
            if slot.fake.requires_grad and gradients:
                port = Port(Role.GRADIENT, slot.port.name, slot.port.index)
                found[Role.GRADIENT].append((port, gradients.get(slot.port)))
        pairs = [pair for group in found.values() for pair in group]
        return [port for port, _ in pairs], [value for _, value in pairs]

    def _placeholders(self, nodes: list[fx.Node]) -> None:
        left = {self._port(old): old for old in self.traced.graph.nodes if old.op == "placeholder"}
        like = {form(slot.fake): left[slot.port].meta["val"] for slot in self.trace.given if self.trace.hides}
        for slot in self.trace.slots:
            old = left.pop(slot.port, None)
            self._input(slot.port, old, old.meta["val"] if old else like[form(slot.fake)])
        for port, old in left.items():
            self._input(port, old, old.meta["val"])
        needed = {operand for node in nodes for operand in node.all_input_nodes}
        for old in self.traced.graph.nodes:
            if old.op == "get_attr" and old in needed:
                self._constant(old)

    def _input(self, port: Port, old: fx.Node | None, value: Any) -> None:
        self.inputs.append(port)
        self.rewriter.placeholder(old, _identifier(port), value)

    def _port(self, old: fx.Node) -> Port:
        index = tracing.input_index(old)
        if index is not None:
            return self.trace.given[index].port
        output = tracing.tangent_index(old)
        if output is None:
            raise CaptureError(
                f"the graph asks for the gradient of {old.meta['desc']}: a buffer or an input is overwritten by a "
                "value that requires a gradient; write it under torch.no_grad(), or detach the value"
            )
        return Port(Role.TANGENT, "", output)

    def _constant(self, old: fx.Node) -> None:
        value = self.traced
        for part in str(old.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Generator):
            raise CaptureError(
                "the model draws from a random generator of its own; a sharded run draws from torch's default one. "
                "Leave out generator=, or draw outside of the model and pass the tensor in"
            )
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"the graph holds {old.target}, a {type(value).__name__}: torch.cond and the like are not supported"
            )
        if self.trace.hides and isinstance(value, FakeTensor):
            raise Unlike("a tensor of a layer that is skipped is used elsewhere")
        refuse_foreign(value)
        name = f"constant:{len(self.constants)}"
        self.constants[name] = value
        if "val" not in old.meta:
            old.meta["val"] = tracing.fake_like(self.trace.mode, value)
        self.inputs.append(Port(Role.CONSTANT, name))
        self.rewriter.placeholder(old, name.replace(":", "_"), old.meta["val"])


def _uncloned(value: fx.Node) -> fx.Node:
    """An output without the copy that `_flat_outputs` made."""
    return value.args[0] if value.target is torch.ops.aten.clone.default else value  # type: ignore[return-value]


def _identifier(port: Port) -> str:
    if port.role is Role.TANGENT:
        return f"tangent_{port.index}"
    return port.name.replace(".", "_").replace(":", "_")


def _brief(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"a tensor of shape {tuple(tensor.shape)} and {tensor.dtype}"


def _explained(error: Exception, path: str) -> CaptureError:
    """The CaptureError for a failed trace: where in the user's code, what, and what to do about it."""
    found = tracing.failing_frame(error.__traceback__)
    place, code = f"module {path!r}" if path else "the model", ""
    if found is not None:
        filename, line = found[0].f_code.co_filename, found[1]
        place += f", {filename}:{line}"
        text = linecache.getline(filename, line).strip()
        code = f"\n    {text}" if text else ""
    if tracing.is_data_dependent(error):
        return CaptureError(
            f"{place}: the program branches on, or takes a shape from, a value that is only known when it runs. "
            "Use torch.where (or a mask) instead of the branch, or compute the value outside the model and pass it in. "
            f"({type(error).__name__}){code}"
        )
    if "entirely functional graph" in str(error):
        return CaptureError(
            f"{place}: the model writes in place to a tensor that is neither a buffer nor an input, so the write would "
            "be lost: register the tensor with register_buffer"
        )
    reason = next(iter(str(error).splitlines()), "")
    return CaptureError(f"{place}: the model cannot be traced: {type(error).__name__}: {reason}{code}")
