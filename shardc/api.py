"""What a person calls: `shard` a model, class or function, or `compile` it ahead of time."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import MethodType
from typing import Any, NamedTuple, ParamSpec, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from shardc.calls import Calls
from shardc.capture.dynamic_sizes import named_dims
from shardc.capture.inputs import call_key, flat_arguments, flatten
from shardc.capture.known_form import KnownForm
from shardc.capture.side_effects.arguments import Containers
from shardc.capture.trace_errors import as_raised
from shardc.capture.unsupported_parts import refuse_scripted
from shardc.compiled import Compiled
from shardc.decided import as_asked
from shardc.distribution import check_data, distribute_if_started, with_global_batch
from shardc.errors import MeshError, ShardcError
from shardc.explain.plan_file.reading import PlanFile
from shardc.family import compiled
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import SHARDED_FROM, Dims, Inputs, ModelCall, unsharded
from shardc.options import Options, ShardOptions, as_keywords
from shardc.passes.capture import TRACING
from shardc.runtime import Executable
from shardc.runtime.execute.accumulation import GradientSums
from shardc.runtime.mesh.parameters import moves


def _default_mesh() -> Mesh:
    """One axis over all processes of torchrun, else over all CUDA devices."""
    size = int(os.environ.get("WORLD_SIZE", "0")) or torch.cuda.device_count()
    if not size:
        raise MeshError("no mesh was named and there is neither torchrun nor a CUDA device; say mesh='dp=2,tp=2'")
    return Mesh((("dp", size),))


Keywords = ParamSpec("Keywords")


class Compile(Protocol[Keywords]):
    """`compile` as type checkers see it: with the options as keywords."""

    def __call__(
        self,
        model: nn.Module,
        mesh: str | Mesh,
        example_inputs: Inputs,
        *args: Keywords.args,
        **options: Keywords.kwargs,
    ) -> Compiled: ...


class Shard(Protocol[Keywords]):
    """`shard` as type checkers see it."""

    def __call__(self, target: Any = None, *args: Keywords.args, **options: Keywords.kwargs) -> Any: ...


def _compile(model: nn.Module, mesh: str | Mesh, example_inputs: Inputs, options: Options) -> Compiled:
    """Compile ahead of time. Of `example_inputs`, positional (a tuple) or keyword (a mapping), only the shapes count.

    A model on the meta device is planned without being allocated. Raises ShardcError; the model stays as it was.
    """
    return as_raised(compiled, ModelCall.of(model, example_inputs), Mesh.parse(mesh), options)


class Request(NamedTuple):
    """What a sharded model was sharded for."""

    mesh: Mesh
    options: Options


class _LastCall(NamedTuple):
    """The last call of a model: its form, what it was looked up by, and its program. Most calls are like the last."""

    form: KnownForm
    key: Any
    named: Dims
    program: Compiled


class _Engine:
    """What a sharded model carries: the request, and what was compiled for each form of call."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.capturing = False
        self.inside = False
        """Whether the forward that was set on the object runs, in which the one of the class is the class's own."""
        self.calls: dict[Any, Calls] = {}
        self.last: Compiled | None = None
        self.last_call: _LastCall | None = None
        self.sums: GradientSums | None = None
        """Where gradients go that are reduced later: see `shardc.accumulate`."""
        self.planned_by_file = False
        """Whether a program was made by the plan that the options name; it is for no other."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Engine:
        return _Engine(self.request)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Engine, (self.request,)

    def call(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._run(module, forward, args, kwargs)

        return with_global_batch(run, args, kwargs, self.request.mesh, self.request.options.data)

    def _run(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        flat = flat_arguments(args, kwargs)
        leaves, spec = (flat, None) if flat is not None else flatten((args, kwargs))
        grad = torch.is_grad_enabled()
        with TRACING:
            # a program that evaluates was planned for parameters as they lay before others moved them
            placed = 0 if grad else moves(module)
            structure = (len(args), *kwargs) if spec is None else str(spec)
            known = self.last_call if spec is None else None
            if known and known.form.fits(leaves, (structure, placed)) and not known.program.broken((args, kwargs)):
                key, named, program = known.key, known.named, known.program
            else:
                call = ModelCall(module, args, kwargs, function=forward)
                named = named_dims(self.request.options.dynamic, call)
                one = () if spec is None else tuple(Containers((args, kwargs)).again)
                key = call_key(leaves, named), structure, one, placed
                program = self._program(key, named, call, leaves)
                form = KnownForm.of(leaves, (structure, placed)) if spec is None else None
                self.last_call = _LastCall(form, key, named, program) if form else None
            if self.sums is not None and grad:
                program = program.accumulating
            self.last = program

        def fallback(outputs: frozenset[int]) -> Executable:
            """Backward starts from outputs that were taken for mere results: compile for exactly these.

            The call may have changed its arguments and what else it reads, and the user may have, since."""
            other_args, other_kwargs = (args, kwargs) if spec is None else pytree.tree_unflatten(leaves, spec)
            other = ModelCall(module, other_args, other_kwargs, program.leaves_of(outputs), forward, grad)
            with torch.enable_grad(), TRACING, program.as_captured():
                return self._program(key, named, other, leaves).executable

        return program.run(leaves, (args, kwargs), fallback, self.sums)

    def _program(self, key: Any, named: Dims, call: ModelCall, leaves: list[Any]) -> Compiled:
        calls = self.calls.get((key, call.differentiable))
        if calls is None:
            options = self._options()
            calls = Calls(self.request.mesh, options, named)
            program = self._captured(calls.program, call, leaves)
            self.calls[key, call.differentiable] = calls
            self.planned_by_file = self.planned_by_file or options.plan is not None
            return program
        return self._captured(calls.program, call, leaves)

    def _options(self) -> Options:
        """The options for a form of call that was not met before."""
        options = self.request.options
        if options.plan is None:
            return options
        evaluates = not torch.is_grad_enabled() and PlanFile.read(options.plan).trains
        return replace(options, plan=None) if self.planned_by_file or evaluates else options

    def _captured(self, function: Callable[..., Compiled], *args: Any) -> Compiled:
        """Call what may capture the model: its forward is the plain one meanwhile."""
        self.capturing = True
        try:
            return as_raised(function, *args)
        finally:
            self.capturing = False

    def result(self) -> Compiled:
        if self.last is None:
            raise ShardcError(
                "nothing is compiled yet: call the model once, or use shardc.compile(model, mesh, inputs)"
            )
        return self.last


class ShardedForward:
    """The forward of a sharded class, which compiles. A forward set on an object does not replace it: that is what is
    captured then. `engine` gives that of an object."""

    def __init__(self, function: Callable[..., Any], engine: Callable[[nn.Module], _Engine]) -> None:
        self.function, self.engine = function, engine

    def __get__(self, module: nn.Module | None, kind: type | None = None) -> Any:
        return self.function if module is None else MethodType(self.function, module)

    def __set__(self, module: nn.Module, forward: Any) -> None:
        vars(module)["forward"] = forward

    def __delete__(self, module: nn.Module) -> None:
        del vars(module)["forward"]


def engine_of(module: nn.Module) -> _Engine | None:
    """What a sharded object carries; None for what is not sharded."""
    found = next((vars(kind)["forward"] for kind in type(module).__mro__ if "forward" in vars(kind)), None)
    return found.engine(module) if isinstance(found, ShardedForward) else None


def _methods(forward: Callable[..., Any], request: Request) -> dict[str, Any]:
    """What a sharded class has beyond the original: a forward that compiles, and `plan`, `code`, `graph`."""

    def engine(self: nn.Module) -> _Engine:
        state = self.__dict__.get("_shardc")
        if state is None:
            state = self.__dict__["_shardc"] = _Engine(request)
        return state

    def plain_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state, given = engine(self), vars(self).get("forward")
        if given is None or state.inside:
            return forward(self, *args, **kwargs)
        state.inside = True
        try:
            return given(*args, **kwargs)
        finally:
            state.inside = False

    def sharded_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = engine(self)
        with TRACING:  # another thread's capture is none of ours
            traced = state.capturing or torch.compiler.is_compiling()
        plain = MethodType(plain_forward, self)
        return plain(*args, **kwargs) if traced else state.call(self, plain, args, kwargs)

    plain_forward.__wrapped__ = forward  # type: ignore[attr-defined]
    sharded_forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    sharded_forward.__doc__ = forward.__doc__
    return {
        "forward": ShardedForward(torch.compiler.disable(sharded_forward), engine),  # torch.compile calls it as it is
        "compiled": property(lambda self: engine(self).result(), doc="The program of the last call."),
        "plan": property(lambda self: engine(self).result().plan, doc="The plan of the last call."),
        "code": property(lambda self: engine(self).result().code, doc="The generated code of the last call."),
        "graph": lambda self, name: engine(self).result().graph(name),
    }


def _shard(target: Any = None, *, options: ShardOptions) -> Any:
    """Shard a module (in place), a module class (decorator), or a function of tensors, over `mesh`.

    The first call with new input shapes captures, plans and lowers; later calls run the generated code. Without
    torch.distributed the mesh is virtual, all ranks in this process; under torchrun it is real. Raises ShardcError for
    a request that makes no sense.
    """
    asked, mesh = as_asked(options, Mesh.parse(options.mesh) if options.mesh is not None else None)
    request = Request(mesh or _default_mesh(), asked)
    check_data(options.data, request.mesh)
    if target is None:
        return lambda real: _sharded(real, request)
    return _sharded(target, request)


def _sharded(target: Any, request: Request) -> Any:
    if isinstance(target, nn.Module):
        refuse_scripted(target)
        distribute_if_started(target, request.mesh, request.options.data)
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
    methods["__reduce__"] = _reduced
    methods |= {SHARDED_FROM: original, "__class__": property(_class_of, _set_class)}
    module.__class__ = _subclass(original, methods)
    module.__dict__["_shardc"] = _Engine(request)
    return module


class _WritesToOriginal(type):
    """The class of a sharded class: what code assigns to that (`type(self).calls += 1`) is the original's."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if name.startswith(("__", "_abc_")):
            super().__setattr__(name, value)
        else:
            setattr(unsharded(cls), name, value)

    def __delattr__(cls, name: str) -> None:
        delattr(unsharded(cls), name)


def _subclass(original: type[nn.Module], methods: dict[str, Any]) -> type[nn.Module]:
    """A subclass that `original` is not told of: its `__init_subclass__` may keep what it is told."""
    kind: Any = _sharded_kind(type(original))
    if nn.Module in original.__mro__[1:]:
        made = kind(original.__name__, (nn.Module,), methods)
        made.__bases__ = (original,)
        return made
    return kind(original.__name__, (original,), methods)


@cache
def _sharded_kind(kind: type) -> type:
    return type(f"Sharded{kind.__name__}", (_WritesToOriginal, kind) if kind is not type else (_WritesToOriginal,), {})


def _class_of(module: nn.Module) -> type:
    """The user's class, as code of a model asks for it; to Dynamo, which looks methods up there, the sharded one."""
    kind = type(module)
    return kind if sys._getframe(1).f_code.co_filename.startswith(_DYNAMO) else unsharded(kind)


_DYNAMO = os.path.join(os.path.dirname(torch.__file__), "_dynamo", "")


def _set_class(module: nn.Module, kind: type) -> None:
    object.__dict__["__class__"].__set__(module, kind)


def _reduced(module: nn.Module) -> tuple[Any, ...]:
    return _restored, (unsharded(type(module)), module.__dict__["_shardc"].request), module.__getstate__()


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


def _compile_function(options: Callable[Keywords, Options]) -> Compile[Keywords]:
    return as_keywords("compile", _compile, Options)


def _shard_decorator(options: Callable[Keywords, ShardOptions]) -> Shard[Keywords]:
    return as_keywords("shard", _shard, ShardOptions)


compile = _compile_function(Options)
shard = _shard_decorator(ShardOptions)
