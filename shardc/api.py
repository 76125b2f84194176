"""What a person calls: `shard` a model, class or function, or `compile` it ahead of time."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from shardc.capture import capture
from shardc.constrain import Dim, Spec, parse, serialise
from shardc.cost.hardware import Hardware, hardware, this_hardware
from shardc.errors import ConstraintError, MeshError, ShardcError
from shardc.graph import Constant, Port, Program, Role
from shardc.inputs import call_key, flatten
from shardc.layout import Layout
from shardc.mesh import Mesh
from shardc.passes.pipeline import PASSES, Lowered, Settings, lower
from shardc.passes.propagate import match_parameters
from shardc.plan import Plan
from shardc.runtime import DistributedMesh, Executable, distribute, load, swap_in

MODES = ("auto", "propagate")
OUTPUTS = ("full", "sharded")
UNKNOWN = ("replicate", "error")


@dataclass(frozen=True)
class Request:
    """What the user asked for: mesh, mode, constraints by path, hardware, how outputs come back, and what becomes of
    operators that have no rule and cannot be split."""

    mesh: Mesh
    mode: str = "auto"
    constraints: Mapping[str, Spec] = field(default_factory=dict[str, Spec])
    device: Hardware = field(default_factory=lambda: hardware(this_hardware()))
    outputs: str = "full"
    on_unknown: str = "replicate"


def _request(
    mesh: str | Mesh | None,
    mode: str,
    constraints: Mapping[str, Spec] | None,
    device: str | Hardware | None,
    outputs: str,
    on_unknown: str,
) -> Request:
    if mode not in MODES:
        raise ShardcError(f"mode={mode!r} is not known; it is one of {', '.join(MODES)}")
    if outputs not in OUTPUTS:
        raise ShardcError(f"outputs={outputs!r} is not known; it is one of {', '.join(OUTPUTS)}")
    if on_unknown not in UNKNOWN:
        raise ShardcError(f"on_unknown={on_unknown!r} is not known; it is one of {', '.join(UNKNOWN)}")
    return Request(
        Mesh.parse(mesh) if mesh is not None else _default_mesh(),
        mode,
        dict(constraints or {}),
        hardware(device or this_hardware()),
        outputs,
        on_unknown,
    )


def _default_mesh() -> Mesh:
    """One axis over all processes of torchrun, else over all CUDA devices."""
    size = int(os.environ.get("WORLD_SIZE", "0")) or torch.cuda.device_count()
    if not size:
        raise MeshError("no mesh was named and there is neither torchrun nor a CUDA device; say mesh='dp=2,tp=2'")
    return Mesh((("dp", size),))


class Compiled:
    """A program lowered for one mesh and one set of input shapes: `plan`, `code`, `graph(pass)`; call it to run it."""

    def __init__(self, module: nn.Module, lowered: Lowered, request: Request) -> None:
        self._module = module
        self._lowered = lowered
        self._request = request
        self._executable: Executable | None = None

    @property
    def plan(self) -> Plan:
        return self._lowered.plan

    @property
    def code(self) -> str:
        """The generated Python, which is what runs."""
        return self._lowered.code

    def graph(self, name: str) -> str:
        """The graph after a pass: capture, normalize, propagate, assign, reshard, localize or codegen."""
        if name not in self._lowered.graphs:
            raise ShardcError(f"no pass is called {name!r}; the passes are {', '.join(PASSES)}")
        return self._lowered.graphs[name]

    def save(self, path: str | Path) -> None:
        """Write the generated module; it runs with torch and shardc.runtime alone (`shardc.runtime.load`)."""
        Path(path).write_text(self.code)

    @property
    def executable(self) -> Executable:
        """The code, loaded on this process's mesh. Under torch.distributed the parameters become DTensors here."""
        if self._executable is None:
            executable = Executable(load(self.code))
            if isinstance(executable.mesh, DistributedMesh):
                _distribute(self._module, executable)
            self._executable = executable
        return self._executable

    def run(self, leaves: list[Any], fallback: Callable[[frozenset[int]], Executable] | None = None) -> Any:
        """Run on flat inputs; returns what the program returns, in its own structure."""
        program = self._lowered.program
        state: dict[str, Tensor] = dict(self._module.named_parameters(remove_duplicate=False))
        state |= dict(self._module.named_buffers(remove_duplicate=False))
        meta = next((name for name, t in state.items() if t.is_meta), None)
        if meta is not None:
            raise ShardcError(f"{meta} is on the meta device: this model was planned but has no values to run with")
        outputs = self.executable.run(state | program.constants, leaves, fallback)
        outputs = [out if i in program.attached else out.detach() for i, out in enumerate(outputs)]
        made = [leaf.value if isinstance(leaf, Constant) else outputs[leaf] for leaf in program.out_leaves]
        return pytree.tree_unflatten(made, program.out_spec)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(flatten((args, kwargs))[0])

    def leaves_of(self, outputs: frozenset[int]) -> frozenset[int]:
        """The flat positions in the user's output of the graph outputs numbered `outputs`."""
        return frozenset(i for i, leaf in enumerate(self._lowered.program.out_leaves) if leaf in outputs)


def _distribute(module: nn.Module, executable: Executable) -> None:
    """Store every parameter as a DTensor of its rank's part; optimizers keep their references."""
    slots = {slot.name: slot for slot in executable.inputs if slot.role == "parameter"}
    assert isinstance(executable.mesh, DistributedMesh)
    swap_in(
        [
            (parameter, distribute(parameter, slots[name], executable.mesh))
            for name, parameter in module.named_parameters()
            if name in slots and not isinstance(parameter, DTensor)
        ]
    )


def compile(
    model: nn.Module,
    mesh: str | Mesh,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    mode: str = "auto",
    constraints: Mapping[str, Spec] | None = None,
    hardware: str | Hardware | None = None,
    outputs: str = "full",
    on_unknown: str = "replicate",
) -> Compiled:
    """Compile ahead of time. Of `example_inputs`, positional (a tuple) or keyword (a mapping), only the shapes count.

    A model on the meta device is planned without being allocated. `mode="auto"` lets the solver choose every layout,
    `"propagate"` spreads the constraints and leaves the rest whole. `outputs="sharded"` leaves outputs as they lie
    (DTensors under torch.distributed). Operators without a rule are tried; `on_unknown="error"` refuses those that
    would have to run whole on every rank. Raises ShardcError; the model stays as it was.
    """
    args, kwargs = ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})
    return _compile(model, args, kwargs, _request(mesh, mode, constraints, hardware, outputs, on_unknown))


def _compile(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], request: Request,
    differentiable: frozenset[int] | None = None, hooks: bool = True,
) -> Compiled:  # fmt: skip
    _check_world(request.mesh)
    paths = [path for path, _ in model.named_modules() if path]
    specs = {pattern: _spec(pattern, spec) for pattern, spec in request.constraints.items()}
    start = time.process_time()
    program = capture(
        model,
        args,
        kwargs,
        grad=torch.is_grad_enabled(),
        differentiable=differentiable,
        constraints={p: s for p, s in request.constraints.items() if _is_module(p, paths)},
        hooks=hooks,
    )
    phases = {"capture": time.process_time() - start}
    ports = [port for port in program.inputs if port.role is Role.PARAMETER]
    parameters = _named(program, ports, specs, paths) + _stored(model, ports, request.mesh)
    whole = request.outputs == "full"
    settings = Settings(request.mesh, request.device, request.mode, whole, parameters, request.on_unknown)
    return Compiled(model, lower(program, settings, phases), request)


def _named(
    program: Program, ports: list[Port], specs: dict[str, tuple[Dim, ...]], paths: list[str]
) -> list[tuple[Port, tuple[Dim, ...], str]]:
    """The parameters that the constraints name, by any of their names, each demand once."""
    home = {port.name: port for port in ports}
    aliases = {name: home[first] for name, first in program.tied.items() if first in home}
    found = match_parameters([*ports, *(Port(Role.PARAMETER, name) for name in aliases)], specs, paths)
    unique = {(aliases.get(port.name, port), dims): label for port, dims, label in reversed(found)}
    return [(port, dims, label) for (port, dims), label in reversed(unique.items())]


def _spec(pattern: str, spec: Spec) -> tuple[Dim, ...]:
    try:
        return parse(serialise(spec))
    except (TypeError, ValueError) as error:
        raise ConstraintError(f"constraints[{pattern!r}]: cannot read {spec!r}: {error}") from error


def _is_module(pattern: str, paths: list[str]) -> bool:
    from fnmatch import fnmatchcase

    return any(fnmatchcase(path, pattern) for path in paths)


def _stored(model: nn.Module, ports: list[Port], mesh: Mesh) -> list[tuple[Port, tuple[Dim, ...], str]]:
    """Parameters that are DTensors already stay as they are stored."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    found: list[tuple[Port, tuple[Dim, ...], str]] = []
    for port in ports:
        tensor = tensors[port.name]
        if isinstance(tensor, DTensor):
            layout = Layout.from_dtensor(tensor.placements, tensor.shape, mesh)
            dims = tuple(tuple(axis for atom in dim for axis in atom.axes) for dim in layout.dims)
            found.append((port, dims, f"the stored layout of {port.name}"))
    return found


def _check_world(mesh: Mesh) -> None:
    """Under torchrun the mesh must have as many devices as there are processes."""
    if not (torch.distributed.is_initialized() or "WORLD_SIZE" in os.environ):
        return
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else int(os.environ["WORLD_SIZE"])
    if mesh.size != world:
        relation = "larger than" if mesh.size > world else "smaller than"
        raise MeshError(
            f"mesh {mesh} has {mesh.size} devices, {relation} the {world} processes of this run; "
            f"start torchrun with --nproc-per-node {mesh.size} or name a mesh of {world} devices"
        )


class _Engine:
    """What a sharded model carries: the request, and what was compiled for each kind of call."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.capturing = False
        self.compiled: dict[Any, Compiled] = {}
        self.last: Compiled | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Engine:
        return _Engine(self.request)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Engine, (self.request,)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = flatten((args, kwargs))
        key = (call_key(module, leaves), str(spec))
        compiled = self._get(key, None, module, args, kwargs)
        self.last = compiled

        def fallback(outputs: frozenset[int]) -> Executable:
            """Backward starts from outputs that were taken for mere results: compile for exactly these."""
            wanted = compiled.leaves_of(outputs)
            with torch.enable_grad():
                return self._get(key, wanted, module, args, kwargs).executable

        return compiled.run(leaves, fallback)

    def _get(
        self,
        key: Any,
        differentiable: frozenset[int] | None,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Compiled:
        identity = (key, differentiable)
        if identity not in self.compiled:
            self.capturing = True
            try:
                self.compiled[identity] = _compile(module, args, kwargs, self.request, differentiable, hooks=False)
            finally:
                self.capturing = False
        return self.compiled[identity]

    def result(self) -> Compiled:
        if self.last is None:
            raise ShardcError(
                "nothing is compiled yet: call the model once, or use shardc.compile(model, mesh, inputs)"
            )
        return self.last


def _methods(forward: Callable[..., Any], request: Request) -> dict[str, Any]:
    """What a sharded class has beyond the original: a forward that compiles, and `plan`, `code`, `graph`."""

    def engine(self: nn.Module) -> _Engine:
        found = self.__dict__.get("_shardc")
        if found is None:
            found = self.__dict__["_shardc"] = _Engine(request)
        return found

    def sharded_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = engine(self)
        if own.capturing or torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        return own.call(self, args, kwargs)

    sharded_forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    sharded_forward.__doc__ = forward.__doc__
    return {
        "forward": sharded_forward,
        "compiled": property(lambda self: engine(self).result(), doc="The program of the last call."),
        "plan": property(lambda self: engine(self).result().plan, doc="The plan of the last call."),
        "code": property(lambda self: engine(self).result().code, doc="The generated code of the last call."),
        "graph": lambda self, name: engine(self).result().graph(name),
    }


def shard(
    target: Any = None,
    *,
    mesh: str | Mesh | None = None,
    mode: str = "auto",
    constraints: Mapping[str, Spec] | None = None,
    hardware: str | Hardware | None = None,
    outputs: str = "full",
    on_unknown: str = "replicate",
) -> Any:
    """Shard a module (in place), a module class (decorator), or a function of tensors, over `mesh`.

    The first call with new input shapes captures, plans and lowers; later calls run the generated code. Without
    torch.distributed the mesh is virtual, all ranks in this process; under torchrun it is real. See `compile` for the
    options. Raises ShardcError for a request that makes no sense.
    """
    request = _request(mesh, mode, constraints, hardware, outputs, on_unknown)
    return (lambda real: _sharded(real, request)) if target is None else _sharded(target, request)


def _sharded(target: Any, request: Request) -> Any:
    if isinstance(target, nn.Module):
        return _shard_module(target, request)
    if inspect.isclass(target) and issubclass(target, nn.Module):
        for name, value in _methods(target.forward, request).items():
            setattr(target, name, value)
        return target
    if callable(target):
        return _shard_function(target, request)
    raise ShardcError(f"cannot shard {target!r}: it is no nn.Module, no class of modules and no function")


def _shard_module(module: nn.Module, request: Request) -> nn.Module:
    """Swap the object's class for a subclass, so that paths, state_dict and isinstance stay as they are."""
    if "_shardc" in module.__dict__:
        module.__dict__["_shardc"] = _Engine(request)
        return module
    original = type(module)
    methods = {**_methods(original.forward, request), "__module__": original.__module__}
    # pickle finds no class of its own in the module: the original is named, and sharded again
    methods["__reduce__"] = lambda self: (_restored, (original, self.__dict__["_shardc"].request), self.__getstate__())
    module.__class__ = type(original.__name__, (original,), methods)
    module.__dict__["_shardc"] = _Engine(request)
    return module


def _restored(original: type[nn.Module], request: Request) -> nn.Module:
    """An empty object of the sharded class, whose state pickle and copy fill in."""
    return _shard_module(original.__new__(original), request)


class _Function(nn.Module):
    """A function of tensors, seen as a module without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _shard_function(function: Callable[..., Any], request: Request) -> Any:
    return _shard_module(_Function(function), request)
