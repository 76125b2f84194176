"""Capture: a module and example inputs become a `Program`, the joint forward and backward graph in ATen.

    program = capture(model, (x,))      %mm = mm(%x, %w)  ...  %loss, and the gradient of every parameter

The model runs on fake CPU tensors: nothing is computed and nothing is allocated. So models on the meta device, and
models larger than memory, are captured as they are. The model itself stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from shardc.capture.eager_results import with_eager_results
from shardc.capture.experts.written import Changed, WrittenExperts
from shardc.capture.inputs import opaque
from shardc.capture.masks.attention_masks import with_plain_masks
from shardc.capture.model_trace import ModelTrace
from shardc.capture.precision import refuse_mixed_types, with_casts
from shardc.capture.program_builder import ProgramBuilder
from shardc.capture.repeated_layers import Repeat, find
from shardc.capture.side_effects.stand_ins import ChangesAtEveryCall, StandIns
from shardc.capture.skipped_layers import Watch
from shardc.capture.state import State
from shardc.capture.stitch import fill
from shardc.capture.torch_patches.attention.written import Recognition, Unrecognised
from shardc.capture.torch_patches.compiling_flag import CompilingFlag, Place
from shardc.capture.trace_errors import ModelError
from shardc.capture.unsupported_parts import refuse_unsupported
from shardc.errors import CaptureError
from shardc.ir.constrain import Spec
from shardc.ir.precision import Precision
from shardc.ir.program import Program
from shardc.runtime.errors import RankError


def capture(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    grad: bool = True,
    called_with_grad: bool = True,
    differentiable: frozenset[int] | None = None,
    constraints: Mapping[str, Spec] | None = None,
    function: Callable[..., Any] | None = None,
    dynamic: Mapping[int, Mapping[int, str]] | None = None,
    precision: Precision | None = None,
    changing: Collection[tuple[int, Any]] = (),
) -> Program:
    """The program that `module(*args, **kwargs)` runs, and its backward.

    Tensors among the inputs become graph inputs, numbered as `tree_flatten((args, kwargs))` does. Anything else becomes
    a constant of the program. Options:

    - `grad=False` captures the forward alone.
    - `called_with_grad=False` calls the model as under `torch.no_grad()`: what is differentiable is what it makes so.
    - `differentiable`: the flat outputs that get a tangent. By default every scalar that requires a gradient (a loss),
      or, if there is none, every floating output that does.
    - `constraints`: specs by pattern of module paths, which `shardc.constrain` puts on the tensors that these modules
      return.
    - `function`: what is called in place of `module`: its forward, where the caller runs the module's own hooks.
    - `dynamic`: names of dims of flat inputs, whose sizes stay symbols in the graph (shardc.capture.dynamic_sizes).
    - `precision`: the types in which the model computes, and gradients are summed (shardc.ir.precision).
    - `changing`: what is known to change from call to call, each as the identity of a container and a key in it.

    Raises CaptureError for a model that cannot be traced; ConstraintError and LayoutError for constraints that name
    nothing or do not fit.
    """
    refuse_unsupported(module)
    arguments = tuple(args), dict(kwargs or {})
    recognition, experts, types = Recognition(), WrittenExperts(), precision or Precision()

    def traced(watch: Watch | None = None, stand_ins: StandIns | None = None) -> tuple[ModelTrace, Program]:
        rest = differentiable, dict(constraints or {}), function or module, dynamic or {}, watch, stand_ins
        told: set[Place] = set()
        while True:
            compiling = CompilingFlag(told)
            how = compiling, recognition, experts, types
            mode = grad and not experts.compares, grad and called_with_grad
            trace = ModelTrace(State(module, opaque(arguments), changing), *arguments, mode, *rest, *how)
            try:
                made = trace.run()
                if dynamic or not experts.unsure(made.graph):
                    return trace, ProgramBuilder(trace, made).program()
            except Changed as error:
                experts.leave(error.event)
            except CaptureError as error:
                by_model = isinstance(error, ModelError)
                if isinstance(error, ModelError):
                    error.at_all_sizes = bool(dynamic)
                if by_model or compiling.last is None or compiling.last in told:
                    asked = experts.rows.empty.asked
                    if by_model and told and asked is None:  # on one device, no code is told that torch compiles
                        asked = CaptureError(str(error))
                    if asked is None:
                        raise
                    raise asked from error
                told.add(compiling.last)

    def captured() -> Program:
        repeats = [] if dynamic else find(module, constraints or ())
        trace, program = (_stitched(traced, repeats) if repeats else None) or _full(traced)
        program = with_casts(with_plain_masks(program), types, dict(trace.tensors()))
        refuse_mixed_types(program, types)
        recognition.check(program.graph.nodes)
        trace.check_met()
        return program

    program = _recognised(captured, recognition, experts)
    return program if dynamic else with_eager_results(program)


Traced = Callable[..., tuple[ModelTrace, Program]]


def _recognised(captured: Callable[[], Program], recognition: Recognition, experts: WrittenExperts) -> Program:
    """The program with the operators for attention and experts that the model writes out, where the model can have
    them: not where it reads the weights, or takes second derivatives."""
    while True:
        try:
            return captured()
        except Unrecognised as error:
            recognition.leave(error.sites)
        except RankError:  # that the operator has no second derivative
            if not recognition.used and not experts.used:
                raise
            if experts.used:
                experts.stop()
            else:
                recognition.stop()


def _stitched(traced: Traced, repeats: list[Repeat]) -> tuple[ModelTrace, Program] | None:
    """A trace that runs only some of the repeated layers, with the others filled in; None if that may not be done."""
    watch = Watch(repeats)
    try:
        trace, program = traced(watch)
        for number, repeat in enumerate(repeats):
            program = fill(program, number, repeat)
    except Unrecognised:
        raise
    except Exception:  # the full trace fails for the same reason, or works
        return None
    return None if watch.broken else (trace, program)


MOST_STAND_INS = 4
"""Traces with stand-ins: each goes without one that code has read in the trace before."""


def _full(traced: Traced) -> tuple[ModelTrace, Program]:
    """A trace of the whole model. Where the model changes something at every call, stand-ins take its part, so that the
    program holds for what it changes it to; none do where code reads all that it changes."""
    try:
        return traced()
    except ChangesAtEveryCall as error:
        found, places = error.candidates, error.places
    read = set[Any]()
    for _ in range(MOST_STAND_INS):
        stand_ins = StandIns(found, places, read)
        if not stand_ins:
            break
        known = len(read)
        try:
            made = traced(None, stand_ins)
        except Unrecognised:
            raise
        except Exception:
            if len(read) == known:  # a stand-in is no number to some library
                break
        else:
            if len(read) == known:
                return made
    return traced(None, StandIns((), places, read))
