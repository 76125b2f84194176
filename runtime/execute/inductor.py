"""Inductor: every function of a generated module that only calls operators is compiled once.

compiled(load(source)).forward(w, x)     # traced at its first call, without values, and compiled by Inductor

Generated code has one function for each kind of layer, so a deep model compiles no longer than a flat one. Sizes are
those of one plan and nothing depends on values, so what was traced needs no guards: shapes and strides of arguments
choose among traces. Collectives are opaque operators. Each that is started takes the one before it as an operand, so
that all ranks start them in the order of the generated code.
"""

from __future__ import annotations

import itertools
import linecache
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._inductor.exc import InvalidCxxCompiler  # what Inductor raises where there is no compiler
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes  # torch has no public way out of a trace

from shardc.runtime.collectives.collective import AnyCollective, Started
from shardc.runtime.errors import RankError
from shardc.runtime.execute.stretches import cut
from shardc.runtime.mesh.mesh import Context, current, entered

_UNDERWAY: dict[int, Callable[[], Tensor]] = {}
_NUMBERS = itertools.count()
_LOCK = threading.RLock()


@torch.library.custom_op("shardc::begin", mutates_args=())
def _begin(operand: Tensor, before: list[Tensor], collective: str, axis: str, op: str) -> Tensor:
    """Start a collective behind those `before`; its number, by which it lands."""
    context, number = current(), next(_NUMBERS)
    if len(context.mesh.ranks) > 1 or _COLLECTIVES[collective].writes_operand:
        operand = operand.clone()  # compiled code writes on in its memory, and takes it for what it was
    _UNDERWAY[number] = context.send(_COLLECTIVES[collective], axis, operand, op)
    return torch.tensor([number])


@_begin.register_fake
def _begin_fake(operand: Tensor, before: list[Tensor], collective: str, axis: str, op: str) -> Tensor:
    return torch.empty(1, dtype=torch.int64)


@torch.library.custom_op("shardc::land", mutates_args=())
def _land(number: Tensor, read: list[Tensor], shape: list[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Wait for a collective. `read` is what its transport reads until then: named here, nobody writes to its memory."""
    return _UNDERWAY.pop(int(number))().contiguous()


@_land.register_fake
def _land_fake(number: Tensor, read: list[Tensor], shape: list[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


_COLLECTIVES: dict[str, AnyCollective] = {}


@dataclass
class _Traced(Started[Any]):
    """A collective that compiled code has started. It goes from function to function as its number and what is read."""

    number: Tensor
    read: list[Tensor]
    form: tuple[list[int], torch.dtype, Callable[[Tensor], Any]]


def _traced(number: Tensor, read: list[Tensor], form: Any) -> _Traced:
    shape, dtype, finish = form
    like = read[0]
    return _Traced(lambda: finish(torch.ops.shardc.land(number, read, shape, dtype, like)), number, read, form)


def _parts(started: _Traced) -> tuple[list[Tensor], Any]:
    return [started.number, *started.read], started.form


def _of_parts(parts: Iterable[Tensor], form: Any) -> _Traced:
    number, *read = parts
    return _traced(number, read, form)


pytree.register_pytree_node(_Traced, _parts, _of_parts)


class _Tracing(Context):
    """The running rank while a function is traced: collectives are written down. `placed` tells whether what was traced
    depends on where the rank is."""

    def __init__(self, real: Context) -> None:
        super().__init__(real.mesh, real.rank, None)
        self.coordinates = _Noted(real.coordinates)
        self.microbatches = real.microbatches
        self.last: list[Tensor] = []

    @property
    def placed(self) -> bool:
        return isinstance(self.coordinates, _Noted) and self.coordinates.read

    def start(  # type: ignore[override]
        self, collective: AnyCollective, axis: str, operand: Tensor, finish: Any = lambda moved: moved, op: str = ""
    ) -> Started[Any]:
        if collective.uneven:
            raise RankError(f"{collective.name} sends as many rows as values tell")
        _COLLECTIVES[collective.name] = collective
        operand, ranks = operand.contiguous(), self.mesh.axes[axis]
        with _disable_current_modes():
            sample = torch.empty(operand.shape, dtype=operand.dtype, device="meta")
            moved = collective.exchange([sample] * ranks, 0, op)
        number = torch.ops.shardc.begin(operand, self.last, collective.name, axis, op)
        self.last = [number]
        read = operand.new_empty(0) if collective.writes_operand else operand  # it has its own
        return _traced(number, [read], (list(moved.shape), moved.dtype, finish))


class _Noted(dict[str, int]):
    """Coordinates that note whether they are read."""

    read = False

    def __getitem__(self, axis: str) -> int:
        self.read = True
        return super().__getitem__(axis)


def _scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    """One element in each row, as gradients of losses have them: compared with where it belongs, it fuses."""
    others = [place for place in range(x.dim()) if place != dim % max(x.dim(), 1)]
    one = x.dim() > 0 and index.shape == source.shape and index.shape[dim] == 1
    if not one or any(x.shape[place] != index.shape[place] for place in others):
        return NotImplemented
    places = torch.arange(x.shape[dim], device=x.device).view(
        [1 if place in others else -1 for place in range(x.dim())]
    )
    return x + torch.where(places == index, source, 0)


def _scatter_add_in_place(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    made = _scatter_add(x, dim, index, source)
    return made if made is NotImplemented else x.copy_(made)


_REWRITES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.scatter_add.default: _scatter_add,
    torch.ops.aten.scatter_add_.default: _scatter_add_in_place,
}


class CompiledFunction:
    """A function of a generated module, compiled at its first call. `programs` counts what was compiled; `reason` says
    why it runs as it is written, where it draws random numbers or what it sends depends on values."""

    def __init__(self, function: Callable[..., Any], empties: bool) -> None:
        self.function, self.empties = function, empties
        self.__name__, self.__globals__ = function.__name__, function.__globals__  # type: ignore[attr-defined]
        self.reason = ""
        self.programs = 0
        self._known: dict[Any, tuple[Callable[..., Any], pytree.TreeSpec]] = {}

    def __call__(self, *args: Any) -> Any:
        leaves, spec = pytree.tree_flatten(args)
        if self.reason or not all(isinstance(leaf, Tensor) for leaf in leaves):
            return self.function(*args)
        if self.empties:
            for argument in args:
                if type(argument) is list:
                    argument.clear()  # what it held is freed by whoever reads it last
        key = tuple([(leaf.shape, leaf.stride()) for leaf in leaves])
        context = current()
        here = tuple(context.coordinates.values()), key  # also which micro-batch it is
        found = self._known.get(key) or self._known.get(here)
        if found is None:
            with _LOCK:
                found = self._known.get(key) or self._known.get(here) or self._made(key, here, leaves, spec, context)
        if found is None:
            return self.function(*pytree.tree_unflatten(leaves, spec))
        run, out = found
        return pytree.tree_unflatten(run(*leaves), out)

    def _made(self, key: Any, here: Any, leaves: Sequence[Tensor], spec: pytree.TreeSpec, context: Context) -> Any:
        outs: list[pytree.TreeSpec] = []

        def flat(*tensors: Tensor) -> list[Any]:
            results, out = pytree.tree_flatten(self.function(*pytree.tree_unflatten(tensors, spec)))
            outs.append(out)
            return results

        tracing, given = _Tracing(context), [leaf.detach() for leaf in leaves]
        try:
            with entered(tracing), torch.no_grad():
                graph = make_fx(flat, _REWRITES, tracing_mode="fake")(*given)
        except Exception as error:
            self.reason = str(error)
            return None
        try:
            run: Any = torch._inductor.compile(graph, [*given])
        except InvalidCxxCompiler as error:
            raise RankError(
                "compile='inductor' needs a C++ compiler on the CPU, and there is none: install g++, name one in $CXX, "
                "or leave compile= out"
            ) from error
        self.programs += 1
        made = self._known[here if tracing.placed else key] = run, outs[0]
        return made


def compiled(module: ModuleType) -> ModuleType:
    """The generated module with all of its functions that only call operators compiled; its `COMPILED` are these."""
    name = str(module.__file__)
    tree, empties = cut("".join(linecache.getlines(name)), given=vars(module).keys() & {"SIZES"})
    made = ModuleType(module.__name__)
    vars(made).update(vars(module))
    exec(compile(tree, name, "exec"), vars(made))
    kinds = {one: CompiledFunction(vars(made)[one], empty) for one, empty in empties.items()}
    vars(made).update(kinds, COMPILED=kinds)
    return made
