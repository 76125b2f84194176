"""Answers of a plan about one value: why it has its layout, what another layout would cost, and what conflicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shardc.analysis.conversions import Conversion
from shardc.ir.printing import columns, in_bytes, in_seconds
from shardc.ir.report import as_html
from shardc.planning.compilation import Compilation


@dataclass(frozen=True)
class Reader:
    """One reader of a value: the `layout` in which it reads the value, and the `steps` that convert it from the layout
    that all readers share."""

    name: str
    layout: str
    steps: tuple[Conversion, ...]
    phase: str
    place: str

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)


@dataclass(frozen=True)
class Way:
    """A variant that could run an operator with the same splits, and the seconds of collectives in its body."""

    variant: str
    seconds: float


@dataclass(frozen=True)
class Instead:
    """Another way to run an operator: what the axes do in the best plan with it, and the `extra` seconds a step."""

    strategy: str
    extra: float


@dataclass(frozen=True)
class Why:
    """Why a value has its layout. `maker` is the operator that makes it, in `compute` seconds; `strategy` what the mesh
    axes do there; `place` its line.

    `demands` are the constraints on the value. `shared` are the conversions made once for all readers, to
    `shared_layout`. `runner_up` is the best plan in which the value has another layout; where that is None,
    `runner_up_missing` says why. `ways` are the variant that runs, then the others that could with the same splits;
    empty without others. `instead` are the variants that have splits of their own, cheapest first.
    """

    value: str
    layout: str
    maker: str
    strategy: str
    compute: float
    place: str
    demands: tuple[str, ...]
    shared: tuple[Conversion, ...]
    shared_layout: str
    readers: tuple[Reader, ...]
    runner_up: WhyNot | None
    runner_up_missing: str = ""
    ways: tuple[Way, ...] = ()
    instead: tuple[Instead, ...] = ()

    def _repr_html_(self) -> str:
        return as_html(str(self).splitlines())

    def __str__(self) -> str:
        lines = [f"{self.value}  {self.layout}"]
        maker = f"made by    {self.maker}" + (f" in {in_seconds(self.compute)}" if self.compute else "")
        lines.append("  " + "; ".join(part for part in (maker, self.strategy, self.place) if part))
        if self.ways:
            runs, *others = self.ways
            would = "".join(f"; {way.variant} would send for {in_seconds(way.seconds)}" for way in others)
            lines.append(f"  variant    {runs.variant}, which sends for {in_seconds(runs.seconds)}{would}")
        lines += [f"  instead    {one.strategy}: {_signed(one.extra)} a step" for one in self.instead]
        lines += [f"  demanded   {demand}" for demand in self.demands]
        if self.shared:
            lines.append(f"  converted  once for all readers, to {self.shared_layout}: {_steps(self.shared)}")
        rows = [(r.name, r.layout, _steps(r.steps), r.phase, r.place) for r in self.readers]
        lines += [f"  read by    {line}" for line in columns(rows, "<<<<<")] if rows else ["  read by    nothing"]
        if self.runner_up is None:
            lines.append(f"  next best  {self.runner_up_missing or 'no other layout is legal'}")
        else:
            lines.append(f"  next best  {self.runner_up.layout}: {self.runner_up.summary}")
        return "\n".join(lines)


@dataclass(frozen=True)
class WhyNot:
    """The cost of the best plan in which a value has `layout` and not `chosen`: `extra` seconds a step, of which
    `compute` are compute. `added` and `removed` are the conversions that differ. `conflict` says why there is no such
    plan, if there is none; `proven` whether both plans are optimal."""

    value: str
    layout: str
    chosen: str
    extra: float = 0.0
    of: float = 0.0
    """Seconds a step of the plan that was chosen."""
    compute: float = 0.0
    added: tuple[Conversion, ...] = ()
    removed: tuple[Conversion, ...] = ()
    conflict: str = ""
    proven: bool = True

    @property
    def summary(self) -> str:
        """The extra cost in a few words."""
        share = f" ({self.extra / self.of:+.1%})" if self.of else ""
        doubt = "" if self.proven else ", not proven"
        if abs(self.extra) <= 1e-9 * self.of:
            return f"at the same cost{doubt}"
        return f"{_signed(self.extra)} a step{share}{doubt}"

    def _repr_html_(self) -> str:
        return as_html(str(self).splitlines())

    def __str__(self) -> str:
        if self.layout == self.chosen:
            return f"{self.value} has layout {self.chosen}: that is the plan"
        if self.conflict:
            return f"{self.value} cannot have layout {self.layout}; it has {self.chosen}\n  {self.conflict}"
        lines = [f"{self.value} as {self.layout} instead of {self.chosen}: {self.summary}"]
        if self.compute:
            lines.append(f"  compute  {_signed(self.compute)}")
        rows = [*_changes("adds", self.added), *_changes("saves", self.removed)]
        if not rows:
            lines.append("  the same conversions")
        return "\n".join([*lines, *(f"  {line}" for line in columns(rows, "<<<<>>><"))] if rows else lines)


@dataclass(frozen=True)
class Conflict:
    """A minimal set of demands and operators' limits that cannot hold together unless a split dim is gathered, or moved
    to another dim. Without any one of `members` the others can. `path` are the operators, with their lines, from one
    demand to where it contradicts the others; `reason` says what is wrong there."""

    members: tuple[str, ...]
    path: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        lines = ["these hold together only with a split dim gathered or moved; to save that, change any one of them:"]
        lines += [f"  - {member}" for member in self.members]
        if self.path:
            more = [f"{len(self.path) - 4} more"] if len(self.path) > 5 else list(self.path[2:-2])
            shown = self.path if len(self.path) < 5 else (*self.path[:2], *more, *self.path[-2:])
            lines.append(f"  by way of {' -> '.join(shown)}" + (f"; {self.reason}" if self.reason else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class Assumption:
    """What a plan assumes of a size of the inputs, in elements, which all `dims` have.

    The plan splits the size evenly at multiples of `even`. It is legal from `least` elements on, and at multiples of
    `only` (1: any). At other sizes the compiler makes another plan, unless a constraint demands the split.
    """

    dims: tuple[str, ...]
    size: int
    even: int
    least: int
    only: int

    def holds(self, size: int) -> bool:
        """Whether the plan can be reused at this size."""
        return size >= self.least and size % self.only == 0

    def __str__(self) -> str:
        text = f"{', '.join(self.dims)} ({self.size}): "
        if self.only > 1:
            padded = "" if self.only % self.even == 0 else f", even at multiples of {self.even}"
            text += f"only multiples of {self.only}{padded}"
        else:
            text += f"even at multiples of {self.even}, padded otherwise"
        return text + f"; not below {self.least}"


class Explainer(Protocol):
    """Answers a plan's questions: it has the program and the problem that was solved, in `c`."""

    c: Compilation

    def why(self, name: str, /, compare: bool = True) -> Why: ...

    def alternatives(self, name: str, /) -> tuple[str, ...]: ...

    def why_not(self, name: str, layout: str, /) -> WhyNot: ...

    def conflicts(self) -> tuple[Conflict, ...]: ...

    def assumes(self) -> tuple[Assumption, ...]: ...

    def checked(self) -> float: ...


def _signed(seconds: float) -> str:
    return ("-" if seconds < 0 else "+") + in_seconds(abs(seconds))


def _steps(steps: Sequence[Conversion]) -> str:
    if not steps:
        return "as it is"
    return ", ".join(
        f"{s.kind} over {s.axis}" + (f" of {in_bytes(s.sent)}" if s.sent else "") + f" in {in_seconds(s.seconds)}"
        for s in steps
    )


def _changes(verb: str, conversions: Sequence[Conversion]) -> list[tuple[str, ...]]:
    """One row for all conversions of one kind, value and line; the most expensive first."""
    groups: dict[tuple[str, ...], list[Conversion]] = {}
    for one in conversions:
        groups.setdefault((one.value, one.kind, one.axis, one.phase, one.place), []).append(one)
    ordered = sorted(groups.items(), key=lambda item: -sum(c.seconds for c in item[1]))
    return [
        (
            verb, value, f"{kind} over {axis}", phase, f"x{len(group)}", in_bytes(sum(c.sent for c in group)),
            in_seconds(sum(c.seconds for c in group)), place,
        )
        for (value, kind, axis, phase, place), group in ordered
    ]  # fmt: skip
