"""A compilation: what is known of one program, and what a pass is.

c = Compilation(call, mesh, options)
c = normalize.run(capture.run(c))     # a pass gives a new record, and leaves the one that it was given as it was
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shardc.analysis.memory import Memory
from shardc.analysis.timeline import Order, Pace
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import Dims, ModelCall
from shardc.ir.program import Program
from shardc.ir.versions import GraphVersion
from shardc.options import Options
from shardc.planning.constraints import Constraint, ParameterDemand, Spread
from shardc.planning.cost_network import Assignment, CostNetwork
from shardc.rules.factors.factored import Factored, Key
from shardc.solver.solve import Solution


class _NotYet:
    """What stands in a field before the pass that fills it has run."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no pass has filled this field of the compilation yet: it has no {name!r}")


_LATER: Any = _NotYet()


class Draft(NamedTuple):
    """What `assign` wrote of a candidate to measure the memory that it holds: `reshard` need not write it again."""

    assignment: Assignment
    resharded: GraphVersion


@dataclass(frozen=True)
class Schedule:
    """What `schedule` decided: no bucket holds more than `most` bytes, and collectives that would hold back others stay
    `apart` from buckets, or not.

    `order` lists the nodes of `bucketed` as they run, with the places where collectives are awaited. `memory` is what a
    rank holds then, `seconds` the time of a step, `hidden` the seconds of collectives that nobody waits for.
    """

    localized: GraphVersion
    bucketed: GraphVersion
    most: float
    apart: bool
    order: Order
    memory: Memory
    seconds: float
    hidden: float


@dataclass(frozen=True)
class Compilation:
    """What was asked, and what each pass has added. A field that no pass has filled yet refuses to be read.

    `reuse` is the compilation of the same program at other sizes, `reuse_at`, whose strategies are taken over where
    they fit; `solution` is then None. `seconds` are the CPU-seconds of every pass.
    """

    call: ModelCall
    mesh: Mesh
    options: Options
    dims: Dims = field(default_factory=dict[int, Mapping[int, str]])
    reuse: Compilation | None = None
    reuse_at: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])

    # capture, normalize, retile
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
    # codegen
    code: Callable[[], str] = _LATER

    def has(self, name: str) -> bool:
        """Whether a pass has filled a field."""
        return getattr(self, name) is not _LATER


@dataclass(frozen=True)
class Pass:
    """One step of the compiler: `run` gives a new compilation. Its docstring, in the pass's file, shows the program
    before and after."""

    name: str
    run: Callable[[Compilation], Compilation]


def compiler_pass(run: Callable[[Compilation], Compilation]) -> Pass:
    """The pass that a function is."""
    return Pass(run.__name__, run)


def names_of(passes: Sequence[Pass]) -> tuple[str, ...]:
    return tuple(one.name for one in passes)
