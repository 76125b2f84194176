"""A program lowered for a mesh: one set of sizes (`Compiled`), or all sizes of one captured program (`Family`)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from shardc.capture.dynamic_sizes import Dims, Dynamic, Template, named_dims, sizes_of
from shardc.capture.inputs import flatten
from shardc.capture.trace import capture
from shardc.cost.hardware import Hardware, hardware, this_hardware
from shardc.cost.memory import NO_STATES, States
from shardc.errors import ConstraintError, MeshError, ShardcError
from shardc.explain.plan import Plan
from shardc.ir.constrain import Dim, Spec, parse, serialise
from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh
from shardc.ir.program import Constant, Port, Program, Role
from shardc.passes.pipeline import PASSES, Lowered, Settings, lower
from shardc.passes.propagate import match_parameters
from shardc.planning.gc_pause import gc_paused
from shardc.planning.reuse_strategies import Choice
from shardc.runtime import DistributedMesh, Executable, RankError, distribute, load, local_mesh, swap_in

TRACING = threading.RLock()
"""Held while a model is captured: for all threads, its tensors are fakes then, and flags of torch are set."""


@dataclass(frozen=True)
class Request:
    """What the user asked for: mesh, mode, constraints by path, hardware, how outputs come back, what
    becomes of operators that have no rule and cannot be split, which dims of the arguments change from call to
    call, and how many bytes a device may hold."""

    mesh: Mesh
    mode: str = "auto"
    constraints: Mapping[str, Spec] = field(default_factory=dict[str, Spec])
    device: Hardware = field(default_factory=lambda: hardware(this_hardware()))
    outputs: str = "full"
    on_unknown: str = "replicate"
    dynamic: Dynamic = field(default_factory=dict[str, Mapping[int, str]])
    memory: float | None = None
    states: States = NO_STATES


class Compiled:
    """A program lowered for one mesh and one set of input shapes: `plan`, `code`, `graph(pass)`; call it to run it.

    Of a family, a call at other sizes runs the member for them; `at` gives that one.
    """

    def __init__(self, module: nn.Module, lowered: Lowered, family: Family | None = None) -> None:
        self._module = module
        self._lowered = lowered
        self._family = family
        self._agreed: str | None = None
        self._executable: Executable | None = None

    @property
    def plan(self) -> Plan:
        return self._lowered.plan

    @property
    def code(self) -> str:
        """The generated Python, which is what runs; on ranks other than 0, once it has run (see `executable`)."""
        return self._lowered.code() if self._agreed is None else self._agreed

    def graph(self, name: str) -> str:
        """The graph after a pass: capture, normalize, retile, propagate, assign, reshard, localize, bucket, overlap or
        codegen. Raises ShardcError for any other name."""
        if name not in self._lowered.graphs:
            raise ShardcError(f"no pass is called {name!r}; the passes are {', '.join(PASSES)}")
        return self._lowered.graphs[name]()

    def save(self, path: str | Path) -> None:
        """Write the generated module; it runs with torch and shardc.runtime alone (`shardc.runtime.load`)."""
        Path(path).write_text(self.code)

    @property
    def executable(self) -> Executable:
        """The code, loaded on this process's mesh. Under torch.distributed the parameters become DTensors here, and all
        ranks take rank 0's code: each plans on its own, and one with less time for it would find another plan."""
        if self._executable is None:
            mesh = local_mesh(self._lowered.plan.mesh.sizes)
            own = self._lowered.code()
            self._agreed = mesh.agreed(own)
            executable = Executable(load(self._agreed), mesh)
            if own != self._agreed:
                _check_same_program(executable, load(own))
            if isinstance(executable.mesh, DistributedMesh):
                _distribute(self._module, executable)
            self._executable = executable
        return self._executable

    def run(self, leaves: list[Any], fallback: Callable[[frozenset[int]], Executable] | None = None) -> Any:
        """Run on flat inputs; returns what the program returns, in its own structure."""
        program = self._lowered.program
        with TRACING:
            executable = self.executable
            state: dict[str, Tensor] = dict(self._module.named_parameters(remove_duplicate=False))
            state |= dict(self._module.named_buffers(remove_duplicate=False))
        meta = next((name for name, t in state.items() if t.is_meta), None)
        if meta is not None:
            raise ShardcError(f"{meta} is on the meta device: this model was planned but has no values to run with")
        outputs = executable.run(state | program.constants, leaves, fallback)
        outputs = [out if i in program.attached else out.detach() for i, out in enumerate(outputs)]
        made = [leaf.value if isinstance(leaf, Constant) else outputs[leaf] for leaf in program.out_leaves]
        return pytree.tree_unflatten(made, program.out_spec)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.at(ModelCall(self._module, args, kwargs)).run(flatten((args, kwargs))[0])

    def at(self, call: ModelCall) -> Compiled:
        """The program for the sizes of a call: this one, unless sizes are dynamic."""
        with TRACING:
            return self if self._family is None else self._family.at(call)

    def leaves_of(self, outputs: frozenset[int]) -> frozenset[int]:
        """The flat positions in the user's output of the graph outputs numbered `outputs`."""
        return frozenset(i for i, leaf in enumerate(self._lowered.program.out_leaves) if leaf in outputs)


def _check_same_program(executable: Executable, own: ModuleType) -> None:
    """The ranks may have planned differently, but for one program."""
    ours, theirs = (
        {(slot.role, slot.name, slot.index, slot.shape, slot.dtype) for slot in slots}
        for slots in (own.INPUTS, executable.inputs)
    )
    if ours != theirs:
        named = ", ".join(f"{role} {name} {list(shape)}" for role, name, _, shape, _ in sorted(ours ^ theirs))
        raise RankError(
            f"rank 0 runs another program here than this rank; they differ in {named}. "
            "Every rank must build the same model and call it with the same global shapes, in the same order"
        )


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


@dataclass(frozen=True)
class ModelCall:
    """One call of a model: its arguments, the flat outputs that get a gradient (None: by default), and whether the
    model's own hooks are part of the program."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    differentiable: frozenset[int] | None = None
    hooks: bool = True

    def dims(self, request: Request) -> Dims:
        """The dynamic dims of the flat inputs. Of a sharded function the parameters are those of the function."""
        named = vars(self.model).get("sharded_function", self.model.forward)
        return named_dims(request.dynamic, named, self.args, self.kwargs)


def compiled(call: ModelCall, request: Request) -> Compiled:
    """Capture, plan and lower one call; with dynamic sizes the result serves all of them."""
    _check_world(request.mesh)
    dims = call.dims(request)
    with TRACING, gc_paused():
        if dims:
            return Family(request, dims).at(call)
        return Compiled(call.model, lower(*captured(call, request, {})))


def captured(call: ModelCall, request: Request, dims: Dims) -> tuple[Program, Settings, dict[str, float]]:
    """The program of a call, what was asked for it, and the CPU-seconds of capture."""
    paths = [path for path, _ in call.model.named_modules() if path]
    specs = {pattern: _spec(pattern, spec) for pattern, spec in request.constraints.items()}
    start = time.process_time()
    program = capture(
        call.model,
        call.args,
        call.kwargs,
        grad=torch.is_grad_enabled(),
        differentiable=call.differentiable,
        constraints={p: s for p, s in request.constraints.items() if _is_module(p, paths)},
        hooks=call.hooks,
        dynamic=dims,
    )
    phases = {"capture": time.process_time() - start}
    ports = [port for port in program.inputs if port.role is Role.PARAMETER]
    parameters = _named(program, ports, specs, paths) + _stored(call.model, ports, request.mesh)
    whole = request.outputs == "full"
    settings = Settings(
        request.mesh, request.device, request.mode, whole, parameters, request.on_unknown,
        request.memory, request.states,
    )  # fmt: skip
    return program, settings, phases


class Family:
    """What one captured program is at the sizes met so far. It is planned at the first; the others adopt the plan's
    strategies and are only lowered. Sizes that break an assumption of the model's code are captured on their own, and
    so are sizes of one, which broadcast."""

    def __init__(self, request: Request, dims: Dims) -> None:
        self._request, self._dims = request, dims
        self._members: dict[tuple[int, ...], Compiled] = {}
        self._template: Template | None = None
        self._settings: Settings | None = None
        self._choice: Choice | None = None
        self._planned_at = ""

    def at(self, call: ModelCall) -> Compiled:
        """The program for the sizes of a call."""
        sizes = sizes_of(self._dims, flatten((call.args, dict(call.kwargs)))[0])
        key = tuple(sizes.values())
        if key not in self._members:
            self._members[key] = Compiled(call.model, self._lowered(call, sizes), self)
        return self._members[key]

    def _lowered(self, call: ModelCall, sizes: Mapping[str, int]) -> Lowered:
        phases: dict[str, float] = {}
        if self._template is None and min(sizes.values()) > 1:
            program, self._settings, phases = captured(call, self._request, self._dims)
            self._template = Template(program, self._dims)
        if self._template is None or self._settings is None or not self._template.admits(sizes):
            return lower(*captured(call, self._request, {}))
        start = time.process_time()
        program = self._template.at(sizes)
        phases["sizes"] = time.process_time() - start
        if self._choice is None:
            lowered = lower(program, self._settings, phases)
            self._choice, self._planned_at = lowered.choice, ", ".join(f"{k}={n}" for k, n in sizes.items())
            return lowered
        return lower(program, self._settings, phases, known=self._choice, planned_at=self._planned_at)


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
