"""Capture: a module and example inputs become a `Program`, the joint forward and backward graph in ATen.

Nothing is computed and nothing is allocated: the model runs on fake CPU tensors, so models on the meta device and
models larger than memory are captured as they are, and the model itself stays untouched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from shardc.capture.model_trace import ModelTrace
from shardc.capture.program_builder import ProgramBuilder
from shardc.capture.repeated_layers import Repeat, find
from shardc.capture.skipped_layers import Watch
from shardc.capture.state import State
from shardc.capture.stitch import fill
from shardc.ir.constrain import Spec
from shardc.ir.program import Program


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

    def traced(watch: Watch | None = None) -> tuple[ModelTrace, Program]:
        rest = grad, differentiable, dict(constraints or {}), hooks, dynamic or {}, watch
        trace = ModelTrace(State(module), *given, *rest)
        return trace, ProgramBuilder(trace, trace.run()).program()

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


Traced = Callable[..., tuple[ModelTrace, Program]]


def _stitched(traced: Traced, repeats: list[Repeat]) -> tuple[ModelTrace, Program] | None:
    """A trace that runs only some of the repeated layers, with the others filled in; None if they may not be."""
    watch = Watch(repeats)
    try:
        trace, program = traced(watch)
        for number, repeat in enumerate(repeats):
            program = fill(program, number, repeat)
    except Exception:  # whatever it is: the full trace meets it as well, or works
        return None
    return None if watch.broken else (trace, program)
