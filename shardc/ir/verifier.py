"""The verifier: what must hold of a program after every pass, checked where `SHARDC_VERIFY` is set.

    after overlap: A collective that is started is awaited once, and nobody reads it but by its wait; ...
        %all_reduce = all_reduce(%mm, axis=dp)     f32[512, 256]
        %add = add(%all_reduce, %x)                f32[512, 256]
        ^ reads %all_reduce, which is under way until %wait
        %wait = wait(%all_reduce)                  f32[512, 256]

The lists below say which invariants hold at which stage, and after which passes a program is at that stage. Each list
is in order: an invariant relies on those before it.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from shardc.ir.facts import FACTS
from shardc.ir.invariants.captured import CAPTURED
from shardc.ir.invariants.invariant import Broken, Checked, Invariant
from shardc.ir.invariants.layouts import LAYOUTS, facts_are_lowered
from shardc.ir.invariants.order import BUCKETS, CODE, OVERLAP
from shardc.ir.invariants.shapes import GLOBAL, LOCAL
from shardc.ir.invariants.simple import SIMPLE
from shardc.ir.invariants.structure import STRUCTURE
from shardc.ir.mesh import Mesh
from shardc.ir.printing import printed
from shardc.ir.program import Program
from shardc.ir.versions import GraphVersion

VARIABLE = "SHARDC_VERIFY"
AROUND = 4
"""Lines that are shown before and after the one at which an invariant does not hold."""

_LOWERED = (*STRUCTURE, facts_are_lowered)
_SIMPLIFIED = (*_LOWERED, *LAYOUTS, *LOCAL, *SIMPLE)
_BUCKETED = (*_LOWERED, *BUCKETS, *LAYOUTS, *LOCAL, *SIMPLE)
_OVERLAPPED = (*_LOWERED, *OVERLAP, *BUCKETS, *LAYOUTS, *LOCAL, *SIMPLE)

STAGES: Mapping[str, tuple[Invariant, ...]] = {
    "captured": (*STRUCTURE, *CAPTURED),
    "resharded": (*_LOWERED, *LAYOUTS, *GLOBAL),
    "localized": (*_LOWERED, *LAYOUTS, *LOCAL),
    "simplified": _SIMPLIFIED,
    "bucketed": _BUCKETED,
    "overlapped": _OVERLAPPED,
    "generated": (*_OVERLAPPED, *CODE),
}
"""What holds at every stage."""

STAGE_AFTER: Mapping[str, str] = {
    **dict.fromkeys(("capture", "normalize", "factor", "microbatch", "retile", "propagate", "assign"), "captured"),
    "reshard": "resharded",
    "localize": "localized",
    **dict.fromkeys(("simplify", "schedule"), "simplified"),
    "bucket": "bucketed",
    "overlap": "overlapped",
    "codegen": "generated",
}
"""The stage at which passes leave a program; a pass that is not here leaves it at the stage of the pass before."""


class VerificationError(AssertionError):
    """A pass left a program that breaks an invariant. No `ShardcError`: nothing that a user writes may lead to it, so
    it is a bug of the compiler, or of a rule or a variant that was added to it."""


def wanted() -> bool:
    """Whether programs are to be verified."""
    return bool(os.environ.get(VARIABLE))


class Known:
    """The invariants that held of what the pass before left, and all that they read. Most passes leave most programs as
    they were, or change their graph only now and then: what held of the very same nodes, arguments and facts is not
    asked again."""

    def __init__(self) -> None:
        self._read: list[Any] = []
        self._ports: Any = None
        self._source = ""
        self._invariants = set[Invariant]()

    def copy(self) -> Known:
        """The same, for another run."""
        other = Known()
        other.take(self)
        return other

    def take(self, other: Known) -> None:
        """Know what another knows, and nothing else."""
        self._read, self._ports, self._source = other._read, other._ports, other._source
        self._invariants = set(other._invariants)

    def open(self, stage: str, checked: Checked) -> list[Invariant]:
        """The invariants of a stage that have to be asked."""
        ports = [*checked.program.inputs], [*checked.program.outputs], checked.mesh
        read = list(_read(checked.graph))
        if ports != self._ports or len(read) != len(self._read) or not all(map(operator.is_, read, self._read)):
            self._invariants = set()
        if checked.source != self._source:
            self._invariants.difference_update(CODE)
        self._read, self._ports, self._source = read, ports, checked.source
        return [one for one in STAGES[stage] if one not in self._invariants]

    def add(self, one: Invariant) -> None:
        """An invariant holds of what was opened last."""
        self._invariants.add(one)


def _read(graph: fx.Graph) -> Iterator[object]:
    """All that invariants read of a graph: objects that nobody changes, so that the same objects are the same graph."""
    for node in graph.nodes:
        facts = node.meta.get(FACTS)
        base = getattr(facts, "base", None)
        yield from (node, node.op, node.name, node.target, node.args, node.kwargs, facts)
        yield base and base[0].meta.get(FACTS)


def verify(
    name: str, stage: str, graph: fx.Graph, program: Program, mesh: Mesh, source: str = "", known: Known | None = None
) -> None:
    """Check what the pass called `name` left at a stage: its graph, whose inputs and outputs are those of `program`,
    and the generated `source` if there is one. Passes of one run share what is `known`. Raises VerificationError at the
    first invariant that does not hold."""
    checked, known = Checked(graph, program, mesh, source), known or Known()
    for one in known.open(stage, checked):
        try:
            broken = next(one.broken(checked), None)
        except Exception as error:
            raise VerificationError(f"{_head(name, one)}\nit could not be checked: {error!r}") from error
        if broken is not None:
            raise VerificationError(f"{_head(name, one)}\n{_around(checked, broken)}")
        known.add(one)


def _head(name: str, one: Invariant) -> str:
    return (
        f"the pass {name!r} broke the invariant {one.name!r}, which is a bug of shardc and not of your program: "
        f"{one.sentence}"
    )


def _around(checked: Checked, broken: Broken) -> str:
    """The lines around the one that is broken, with what is wrong beneath it."""
    if isinstance(broken.at, int):
        return _marked(checked.source.splitlines(), broken.at, broken.text)
    place = checked.nodes.index(broken.at)
    first = max(place - AROUND, 0)
    # of a program that is broken: layouts as they are, which cannot always be simplified
    lines = GraphVersion.of(checked.graph).lines()[first : place + AROUND + 1]
    return _marked(printed(lines).splitlines(), place - first, f"%{broken.at.name}: {broken.text}")


def _marked(lines: Sequence[str], place: int, text: str) -> str:
    first = max(place - AROUND, 0)
    shown = [f"    {line}" for line in lines[first : place + AROUND + 1]]
    shown.insert(place - first + 1, f"    ^ {text}")
    return "\n".join(shown)
