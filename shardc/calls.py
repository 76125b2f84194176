"""The programs for calls of one form: those that differ in nothing but sizes and in what the model's code reads.

model(x[4, 12])     a program of its own
model(x[4, 16])     dim 1 changes: a program captured for all its sizes
model(x[4, 20])     the same program
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shardc.capture.changing_sizes import ChangingSizes, Place, fixed_sizes
from shardc.capture.dynamic_sizes import sizes_of
from shardc.capture.torch_patches.key_value_caches import growth
from shardc.capture.trace_errors import ModelError
from shardc.compiled import Compiled
from shardc.distribution import check_world
from shardc.errors import CaptureError
from shardc.family import Family, compiled
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import Dims, ModelCall
from shardc.options import Options
from shardc.planning.compilation import Compilation
from shardc.planning.gc_pause import gc_paused

MANY_PROGRAMS = 8
"""Programs for calls of one form, after which the user is told what makes new ones."""


@dataclass(frozen=True)
class _Dynamic:
    """A program for all sizes of `dims`, and the sizes of all other dims."""

    family: Family
    dims: Dims
    fixed: tuple[Any, ...]
    still: set[Place]
    """Dims that do not grow any more: before and after, there are programs of their own."""


class Calls:
    """Calls of one form: `named` are the dims of their inputs that the user says change. What else changes is found out
    from the second call on."""

    def __init__(self, mesh: Mesh, options: Options, named: Dims) -> None:
        self._mesh, self._options, self._named = mesh, options, named
        self._alone: dict[tuple[Any, ...], list[Compiled]] = {}
        self._dynamic: list[_Dynamic] = []
        self._changing: ChangingSizes | None = ChangingSizes(named)
        """None where the model cannot be captured for all sizes."""
        self._met = False
        self._raised = False
        """Whether the model has just raised an error of its own in a trace for many sizes."""
        self._first: tuple[Compiled, list[Any]] | None = None

    def program(self, call: ModelCall, leaves: list[Any]) -> Compiled:
        """The program of a call with these flat inputs: one whose guards hold, or a new one."""
        broken: list[str] = []
        programs = self._alone.get(fixed_sizes(leaves, {}), []) if self._alone else []
        for index, program in enumerate(programs):
            reason = program.broken((call.args, call.kwargs))
            if not reason:
                _to_front(programs, index)
                return program
            broken.append(reason)
        for index, one in enumerate(self._dynamic):
            if fixed_sizes(leaves, one.dims) == one.fixed and one.family.admits(leaves):
                reason = one.family.broken(call)
                if not reason:
                    _to_front(self._dynamic, index)
                    with gc_paused():
                        return one.family.at(call, leaves)
                broken.append(reason)
        if len(broken) == MANY_PROGRAMS:
            warnings.warn(
                f"{type(call.model).__name__} is compiled again and again, because its code reads what changes from "
                f"call to call: {broken[0]}. Make it a tensor, or leave it out of forward",
                stacklevel=6,
            )
        if broken:
            call = replace(call, changing=self._changes())
        found = self._for_many_sizes(call, leaves)
        if found is None:
            raised, self._raised = self._raised, False
            found = self._for_these_sizes(call, leaves)
            if raised:  # because sizes had no numbers, and not because of these numbers
                self._changing = None
        return found

    def _changes(self) -> frozenset[tuple[int, Any]]:
        """What has broken the guards of a program until now."""
        alone = [program.changes() for programs in self._alone.values() for program in programs]
        return frozenset[tuple[int, Any]]().union(*alone, *(one.family.changes() for one in self._dynamic))

    def _for_these_sizes(self, call: ModelCall, leaves: list[Any]) -> Compiled:
        options = self._options if self._first is None else replace(self._options, plan=None)  # it is for the first
        program = compiled(call, self._mesh, options, {})
        self._alone.setdefault(fixed_sizes(leaves, {}), []).insert(0, program)
        if self._first is None:
            # not the user's tensors, but their sizes
            sizes = [torch.empty(one.shape, device="meta") if isinstance(one, Tensor) else one for one in leaves]
            self._first = program, [one if isinstance(one, (Tensor, int)) else None for one in sizes]
        return program

    def _for_many_sizes(self, call: ModelCall, leaves: list[Any]) -> Compiled | None:
        """The program for all sizes of the dims that change; None where there are none, or no such program."""
        if self._changing is None:
            return None
        grown = growth((call.args, dict(call.kwargs)))
        first, self._met = not self._met, True
        dims = self._changing.see(leaves, grown)
        if not dims or min(sizes_of(dims, leaves).values()) < 2:
            return None
        check_world(self._mesh)
        asked = Compilation(call, self._mesh, self._options, dims)
        if self._first is None:
            family = Family(asked)
        else:
            sizes = ", ".join(f"{name}={size}" for name, size in sizes_of(dims, self._first[1]).items())
            family = Family(asked, self._first[0].planned, sizes)
        with gc_paused():
            try:
                family.captured(call)
                if dims != self._named and not family.admits(leaves):
                    raise CaptureError("the program assumes more of its inputs than their sizes")
            except CaptureError as error:
                if dims == self._named:
                    raise
                self._raised = isinstance(error, ModelError)
                if not self._raised and not (first and grown.known):
                    self._changing = None
                return None
            self._dynamic = [one for one in self._dynamic if one.dims == dims or one.still != grown.still]
            self._dynamic.insert(0, _Dynamic(family, dims, fixed_sizes(leaves, dims), grown.still))
            return family.at(call, leaves)


def _to_front(programs: list[Any], index: int) -> None:
    """The next call is probably another of this program."""
    if index:
        programs.insert(0, programs.pop(index))
