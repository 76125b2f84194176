"""A compilation: what the compiler knows of one program, and what a pass is.

c = Compilation(call, mesh, options)
c = normalize.run(capture.run(c))     # a pass returns a new record, and leaves the old one as it was
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shardc.analysis.memory import Memory
from shardc.analysis.timeline import Pace
from shardc.cost.buckets import Buckets
from shardc.cost.memory import States
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import Dims, ModelCall
from shardc.ir.program import Program
from shardc.ir.versions import GraphVersion
from shardc.options import Options
from shardc.planning.constraints import Constraint, ParameterDemand, Spread
from shardc.planning.cost_network import Assignment, CostNetwork
from shardc.planning.given.given import GivenPlan
from shardc.rules.factors.factored import Factored, Key
from shardc.solver import tuning
from shardc.solver.solve import Solution


class _NotYet:
    """Stands in a field until the pass that fills it has run."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no pass has filled this field of the compilation yet: it has no {name!r}")


_LATER: Any = _NotYet()


class Draft(NamedTuple):
    """A candidate that `assign` resharded to measure its memory, so that `reshard` need not do it again."""

    assignment: Assignment
    resharded: GraphVersion
    titles: Mapping[Key, str]


@dataclass(frozen=True)
class Schedule:
    """The decision of `schedule`: how full `buckets` are (None: there are none), and with `apart`, that collectives
    which would delay others stay out of them.

    `order` lists the nodes of `bucketed` as they run, and where collectives are awaited. `memory` is the peak that a
    rank holds, `seconds` the time of a step, `hidden` the seconds of collectives during which the rank computes; `lost`
    are the seconds, by axis, that the rank loses on account of one.
    """

    localized: GraphVersion
    bucketed: GraphVersion
    buckets: Buckets | None
    apart: bool
    order: Sequence[tuple[str, bool]]
    memory: Memory
    seconds: float
    hidden: float
    lost: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Compilation:
    """The call to compile, and what each pass has added. Reading a field that no pass has filled yet raises
    AttributeError.

    `sizes` are those that the dynamic `dims` have in this program, by name.
    `reuse` is the compilation of the same program at other sizes (`reuse_at`, in words). Its strategies are used where
    they fit; `solution` is then None. `example` is the call as it was captured, with tensors that hold no memory.
    `given` are decisions of a file: `assign` takes them, and solves what they leave open. `titles` are names of values
    for people. `time_limit` are the CPU-seconds that the solver may take without a bound on memory; a plan of
    `too_slow` seconds a step or more is not wanted. `seconds` are the CPU-seconds of every pass.
    """

    call: ModelCall
    mesh: Mesh
    options: Options
    dims: Dims = field(default_factory=dict[int, Mapping[int, str]])
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    time_limit: float = field(default_factory=lambda: tuning.TIME_LIMIT)
    too_slow: float = math.inf
    given: GivenPlan | None = None
    reuse: Compilation | None = None
    reuse_at: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])

    # capture, normalize, retile
    example: ModelCall = _LATER
    program: Program = _LATER
    demands: tuple[ParameterDemand, ...] = ()
    # factor, retile
    factored: Factored = _LATER
    # propagate
    constraints: tuple[Constraint, ...] = ()
    spread: Spread = _LATER
    # assign
    network: CostNetwork = _LATER
    assignment: Assignment = _LATER
    solution: Solution | None = None
    draft: Draft | None = None
    # reshard, localize, bucket, overlap
    lowered: GraphVersion = _LATER
    titles: Mapping[Key, str] = field(default_factory=dict[Key, str])
    # schedule
    pace: Pace = _LATER
    schedule: Schedule = _LATER
    # microbatch: what runs once, before all micro-batches
    prologue: Compilation | None = None
    # what runs once, behind the last of several backwards, from sums of gradients: see `shardc.deferred`
    epilogue: Compilation | None = None
    # codegen
    code: Callable[[], str] = _LATER

    @property
    def states(self) -> States:
        """What the optimizer holds for the parameters that this program trains."""
        return self.options.states(bool(self.program.trained))

    @property
    def randomness(self) -> str:
        """Whose random numbers are drawn: `exact` or `independent` (see `Options.randomness`)."""
        return self.options.drawn_on(self.call.device)

    def has(self, name: str) -> bool:
        """Whether a pass has filled a field."""
        return getattr(self, name) is not _LATER


@dataclass(frozen=True)
class Pass:
    """One step of the compiler: `run` returns a new compilation. The docstring of the pass's file shows the program
    before and after."""

    name: str
    run: Callable[[Compilation], Compilation]


def compiler_pass(run: Callable[[Compilation], Compilation]) -> Pass:
    """Make a pass of a function; the pass has its name."""
    return Pass(run.__name__, run)
