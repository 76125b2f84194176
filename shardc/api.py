"""What a person calls: `shard` a model, class or function, or `compile` it ahead of time."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardc.capture.dynamic_sizes import Dynamic
from shardc.capture.inputs import call_key, flatten
from shardc.compiled import TRACING, Compiled, ModelCall, Request, compiled
from shardc.cost.hardware import Hardware, hardware, this_hardware
from shardc.cost.memory import bytes_of, states_of
from shardc.errors import MeshError, ShardcError
from shardc.ir.constrain import Spec
from shardc.ir.mesh import Mesh
from shardc.runtime import Executable

MODES = ("auto", "propagate")
OUTPUTS = ("full", "sharded")
UNKNOWN = ("replicate", "error")


def request_of(
    mesh: str | Mesh | None,
    mode: str,
    constraints: Mapping[str, Spec] | None,
    device: str | Path | Hardware | None,
    outputs: str,
    on_unknown: str,
    dynamic: Dynamic | None,
    memory: float | str | None = None,
    optimizer: float | str | None = None,
) -> Request:
    """The options of `compile`, checked and resolved. Raises ShardcError naming what is known."""
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
        dict(dynamic or {}),
        None if memory is None else bytes_of(memory),
        states_of(optimizer),
    )


def _default_mesh() -> Mesh:
    """One axis over all processes of torchrun, else over all CUDA devices."""
    size = int(os.environ.get("WORLD_SIZE", "0")) or torch.cuda.device_count()
    if not size:
        raise MeshError("no mesh was named and there is neither torchrun nor a CUDA device; say mesh='dp=2,tp=2'")
    return Mesh((("dp", size),))


def compile(
    model: nn.Module,
    mesh: str | Mesh,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    mode: str = "auto",
    constraints: Mapping[str, Spec] | None = None,
    hardware: str | Path | Hardware | None = None,
    outputs: str = "full",
    on_unknown: str = "replicate",
    dynamic: Dynamic | None = None,
    memory: float | str | None = None,
    optimizer: float | str | None = None,
) -> Compiled:
    """Compile ahead of time. Of `example_inputs`, positional (a tuple) or keyword (a mapping), only the shapes count.

    A model on the meta device is planned without being allocated. `mode="auto"` lets the solver choose every layout,
    `"propagate"` spreads the constraints and leaves the rest whole. `outputs="sharded"` leaves outputs as they lie
    (DTensors under torch.distributed). Operators without a rule are tried; `on_unknown="error"` refuses those that
    would have to run whole on every rank. `dynamic={"input_ids": {0: "batch", 1: "seq"}}` names dims of arguments that
    change from call to call: the program is captured and planned once, and lowered anew for sizes not met before.
    `memory="80GB"` bounds what a device holds at any time, beside the state of the `optimizer` ("adamw", or bytes an
    element of a parameter): where something has to give, values are kept split and regathered, or made again in
    backward, whichever costs the least time. Raises ShardcError; the model stays as it was.
    """
    args, kwargs = ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})
    request = request_of(mesh, mode, constraints, hardware, outputs, on_unknown, dynamic, memory, optimizer)
    return compiled(ModelCall(model, args, kwargs), request)


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
        call = ModelCall(module, args, kwargs, hooks=False)
        with TRACING:
            key = (call_key(module, leaves, call.dims(self.request)), str(spec))
            self.last = found = self._get(key, call)

        def fallback(outputs: frozenset[int]) -> Executable:
            """Backward starts from outputs that were taken for mere results: compile for exactly these."""
            with torch.enable_grad(), TRACING:
                return self._get(key, replace(call, differentiable=found.leaves_of(outputs))).executable

        return found.run(leaves, fallback)

    def _get(self, key: Any, call: ModelCall) -> Compiled:
        identity = (key, call.differentiable)
        self.capturing = True
        try:
            if identity not in self.compiled:
                self.compiled[identity] = compiled(call, self.request)
            return self.compiled[identity].at(call)
        finally:
            self.capturing = False

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
        if torch.compiler.is_dynamo_compiling():
            return forward(self, *args, **kwargs)
        with TRACING:  # another thread's capture is none of ours
            traced = own.capturing or torch.compiler.is_compiling()
        return forward(self, *args, **kwargs) if traced else own.call(self, args, kwargs)

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
    hardware: str | Path | Hardware | None = None,
    outputs: str = "full",
    on_unknown: str = "replicate",
    dynamic: Dynamic | None = None,
    memory: float | str | None = None,
    optimizer: float | str | None = None,
) -> Any:
    """Shard a module (in place), a module class (decorator), or a function of tensors, over `mesh`.

    The first call with new input shapes captures, plans and lowers; later calls run the generated code. Without
    torch.distributed the mesh is virtual, all ranks in this process; under torchrun it is real. See `compile` for the
    options. Raises ShardcError for a request that makes no sense.
    """
    if target is None:
        return lambda real: shard(
            real, mesh=mesh, mode=mode, constraints=constraints, hardware=hardware, outputs=outputs,
            on_unknown=on_unknown, dynamic=dynamic, memory=memory, optimizer=optimizer,
        )  # fmt: skip
    request = request_of(mesh, mode, constraints, hardware, outputs, on_unknown, dynamic, memory, optimizer)
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
        self.sharded_function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.sharded_function(*args, **kwargs)


def _shard_function(function: Callable[..., Any], request: Request) -> Any:
    return _shard_module(_Function(function), request)
