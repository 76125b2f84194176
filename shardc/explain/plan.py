"""The plan: what the solver chose, what it costs, and what is proved about it. `print(plan)` is how people read it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardc.analysis.conversions import Conversion
from shardc.analysis.memory import Memory
from shardc.errors import ShardcError
from shardc.explain.advice import Advice
from shardc.explain.explanations import Assumption, Conflict, Explainer, Why, WhyNot
from shardc.explain.summary import Summary
from shardc.ir.constrain import Spec, serialise
from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh
from shardc.ir.named_files import write_file
from shardc.ir.printing import in_bytes, in_seconds
from shardc.ir.report import Columns, Report, Section

if TYPE_CHECKING:
    from shardc.explain.plan_file.diff import PlanDiff

LOADED = "this plan was unpickled, without the problem that it solves; compile the model again, and ask that plan"
DEAREST = 10
"""So many conversions are told with their causes."""


@dataclass(frozen=True)
class Placed:
    """A parameter, an input or an output, with its layout."""

    role: str
    name: str
    dtype: str
    layout: Layout

    def __str__(self) -> str:
        return f"{self.role:<9} {self.name}  {self.dtype}{self.layout}"


@dataclass(frozen=True)
class Tried:
    """An operator without a rule of its own: the `rule` that trial found for it.

    Where none of its dims may be split, `replicated` says why. Then every rank runs it whole, in `seconds`. Before
    that, its operands are gathered in `gather_seconds`, and a rank sends `gathered` bytes.
    """

    operator: str
    place: str
    rule: str
    replicated: str
    seconds: float
    gather_seconds: float
    gathered: float


@dataclass(frozen=True)
class Plan:
    """Layouts, conversions, predicted seconds, and the proof: no plan in the search space costs less than
    `lower_bound`.

    `cost` is the solver's objective, `compute` plus conversions, in seconds a step. `phases` are CPU-seconds of the
    compiler. `notes` say what the user should know (dims that are padded, constraints that conflict).
    """

    mesh: Mesh
    hardware: str
    mode: str
    placed: tuple[Placed, ...]
    """Parameters and inputs."""
    layouts: dict[str, Layout]
    conversions: tuple[Conversion, ...]
    compute: float
    cost: float
    lower_bound: float
    notes: tuple[str, ...]
    phases: dict[str, float]
    tried: tuple[Tried, ...] = ()
    explainer: Explainer | None = field(default=None, repr=False, compare=False)
    """Answers questions about the plan. It has the whole problem, so it is not saved with the plan."""
    memory: Memory = field(default_factory=Memory)
    hidden: float = 0.0
    """Seconds of conversions during which the rank computes."""
    outputs: tuple[Placed, ...] = ()
    """Outputs in the layouts in which they come back: whole where no axis splits a dim. On a virtual mesh they are
    whole for whoever calls the program."""
    summarise: Callable[[], Summary] | None = field(default=None, repr=False, compare=False)
    """Makes `summary`, when it is first looked at."""
    adviser: Callable[[], tuple[Advice, ...]] | None = field(default=None, repr=False, compare=False)
    """Answers `advice`; not saved with the plan, as the explainer."""
    simplified: float = 0.0
    """Seconds of compute that `cost` charges, in operators that the code does without: constraints, and what `simplify`
    dropped."""

    turns: int = 1
    """How often the program runs in a step: once for every micro-batch. Layouts, conversions, `compute`, `hidden`,
    `cost` and `lower_bound` are those of one."""
    once: float = 0.0
    """Seconds of what runs once a step, before and behind all micro-batches."""
    conversions_once: tuple[Conversion, ...] = ()
    """Conversions of what runs once a step, or behind several calls whose gradients are accumulated."""
    near: bool = False
    """Whether `lower_bound` is that of plans near this one alone: there were too many strategies to offer all."""

    @cached_property
    def summary(self) -> Summary:
        """What the axes do, how fast a step is, how full a device gets, and what binds."""
        return Summary(Mesh(()), "") if self.summarise is None else self.summarise()

    def why(self, value: str) -> Why:
        """Why `value` has its layout: which operator makes it, how every reader reads it, with which conversions, and
        what the second-best layout costs.

        `value` is the path of a parameter or of a module (its output), `input:0`, or a name in `graph("reshard")`.
        Raises ShardcError, with near names, for a value that is not there, and for a plan that was unpickled.
        """
        return self.explained().why(value)

    def why_not(self, value: str, layout: Spec) -> WhyNot:
        """What the best plan with another `layout` of `value` would cost, or what forbids it. Solves the problem again.

        `layout` is written as plans print it (`f32[256@tp, 64]`), or as constraints are (`("tp", None)`, `tp,-`).
        Raises LayoutError for a layout that the value cannot have, and ShardcError as `why` does.
        """
        return self.explained().why_not(value, layout if isinstance(layout, str) else serialise(layout))

    def conflicts(self) -> tuple[Conflict, ...]:
        """Which demands (constraints, outputs that come back whole) and operators' limits cannot hold together unless a
        split dim is gathered or moved. The sets are minimal, and no two have a constraint in common. There are none
        where the demands cost no more than the reduction of partial sums."""
        return self.explained().conflicts()

    def assumes(self) -> tuple[Assumption, ...]:
        """At which other sizes of the inputs the plan is legal, and where it would pad: one entry for every size that
        is split."""
        return self.explained().assumes()

    def check(self) -> float:
        """Prove again a lower bound of the cost of every plan in the search space, in seconds a step. The proof uses a
        certificate, and code that shares nothing with the search (`shardc.solver.proof.certificate.check`).

        Plans of many equal layers come with their certificate. For others the first call makes it. Where that takes too
        long, the bound is less than `lower_bound`, which the search has proved. It is never more than `cost`.
        """
        return self.explained().checked()

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON that a person can read, compare and edit; `plan=` of `shard` and `compile` takes it.
        Raises ShardcError where it cannot be written, and for a plan that was unpickled."""
        from shardc.explain.plan_file.as_json import as_json, written  # which is made of plans

        write_file(path, written(as_json(self)))

    def diff(self, other: Plan | str | Path) -> PlanDiff:
        """What is different in `other`, another plan or the file of one: what moved, what is sent, what that costs.
        Raises ShardcError as `save` does, and for a file that is no plan."""
        from shardc.explain.plan_file.as_json import as_json
        from shardc.explain.plan_file.diff import PlanDiff
        from shardc.explain.plan_file.reading import PlanFile

        return PlanDiff(as_json(self), as_json(other) if isinstance(other, Plan) else PlanFile.read(other).data)

    def explained(self) -> Explainer:
        """What answers questions about the plan. Raises ShardcError for a plan that was unpickled."""
        if self.explainer is None:
            raise ShardcError(LOADED)
        return self.explainer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "summary": self.summary, "summarise": None, "explainer": None, "adviser": None}

    @property
    def bytes_per_axis(self) -> dict[str, float]:
        """Bytes that one rank sends over every axis in a step. Where gradients are accumulated over several calls, in
        each of them."""
        once = self.conversions_once if self.turns > 1 else ()
        return {
            axis: sum(self.turns * c.sent for c in self.conversions if c.axis == axis)
            + sum(c.sent for c in once if c.axis == axis)
            for axis in self.mesh.names
        }

    @property
    def predicted(self) -> float:
        """How long a rank runs in a step: seconds of compute and of the conversions that were emitted, less what is
        hidden.

        This may be less than `cost`. `cost` charges every conversion of a value in full, though several can share
        steps, hides none but those of gradients, and charges operators that the code does without. It may also be more:
        for gradients, `cost` assumes that a bucket holds all of their dtype, and that all of backward hides them.
        """
        return self.turns * self._turn + self.once

    @property
    def _turn(self) -> float:
        """Seconds of one micro-batch."""
        return self.compute + sum(c.seconds for c in self.conversions) - self.hidden

    def __str__(self) -> str:
        return str(self.report())

    def advice(self) -> tuple[Advice, ...]:
        """Up to three changes that would raise tokens (or samples) a second, the best first: another batch, another
        mesh of as many devices, more memory. Each is planned again, so this takes several times as long as the plan
        did. Raises ShardcError for a plan that was loaded from a file."""
        if self.adviser is None:
            raise ShardcError(LOADED)
        return self.adviser()

    def _repr_html_(self) -> str:
        return self.report().html()

    def report(self) -> Report:
        """What `print(plan)` shows, in sections."""
        sections = {
            "tensors": self._tensors(),
            "sent, per rank and step": self._sent(),
            "dearest conversions": self._dearest(),
            "rules found by trial": self._tried(),
            "run whole on every rank, for want of a rule": self._replicated(),
        }
        shown = [Section(title, table) for title, table in sections.items() if table.rows]
        if self.notes:
            shown.append(Section("notes", self.notes))
        head = f"plan for mesh {self.mesh} on {self.hardware}, mode={self.mode}"
        slow = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.phases.items() if seconds >= 0.005)
        tail = f"compiled in {sum(self.phases.values()):.2f} CPU-seconds: {slow or 'nothing'}"
        lines = [head, *self._time_lines(), *self._memory_lines(), *self.summary.figures()]
        if self.summary.parallelism.axes:
            shown.insert(0, Section("what the axes do", self.summary.parallelism.lines))
        return Report(lines, shown, [tail])

    def _time_lines(self) -> list[str]:
        gap = (self.cost - self.lower_bound) / self.cost if self.cost else 0.0
        proof = "proven optimal" if gap < 1e-6 else f"within {max(gap, 0.001):.1%} of the proven bound"
        if not self.lower_bound:
            proof = "no bound proven"
        elif self.near:
            proof = "none near it costs less" if gap < 1e-6 else f"within {max(gap, 0.001):.1%} of all near it"
        communication = in_seconds(sum(c.seconds for c in self.conversions))
        parts = f"compute {in_seconds(self.compute)}, conversions {communication}"
        if in_seconds(self.hidden) != in_seconds(0.0):
            parts += f", of which {in_seconds(self.hidden)} hidden"
        if self.turns > 1:
            once = f", and {in_seconds(self.once)} once" if self.once else ""
            return [
                f"  predicted  {in_seconds(self.predicted)} a step: {self.turns} micro-batches of "
                f"{in_seconds(self._turn)} each ({parts}){once}",
                f"  objective  {in_seconds(self.cost)} a micro-batch, {proof}",
            ]
        if in_seconds(self.cost) == in_seconds(self.predicted):
            return [f"  predicted  {in_seconds(self.predicted)} a step, {proof}: {parts}"]
        return [
            f"  predicted  {in_seconds(self.predicted)} a step: {parts}",
            f"  objective  {in_seconds(self.cost)}, {proof}; {self._charged()}",
        ]

    def _charged(self) -> str:
        """Why the objective is not what is predicted."""
        away = "operators that the code does without"
        if in_seconds(self.cost - self.simplified) == in_seconds(self.predicted):
            return f"it charges {away}"
        why, more = "it charges in full the steps that conversions share", ", and hides none but gradients"
        if self.predicted > self.cost:
            why, more = "it assumes fuller buckets than there are", ", and that all of backward hides them"
        elif in_seconds(self.simplified) != in_seconds(0.0):
            why += f" and {away}"
        return why + (more if self.hidden else "")

    def _memory_lines(self) -> list[str]:
        parts = ", ".join(f"{label} {in_bytes(size)}" for label, size in self.memory.largest)
        return [f"  memory     {self.memory.summary}: {parts}"] if self.memory.peak else []

    def _tensors(self) -> Columns:
        """Roles, names and layouts in columns. Repeated layers have one line, with their count."""
        groups: dict[tuple[str, str, str], list[str]] = {}
        for one in (*self.placed, *self.outputs):
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", one.name)
            groups.setdefault((one.role, pattern, f"{one.dtype}{one.layout}"), []).append(one.name)
        rows = [
            (role, names[0], layout, "") if len(names) == 1 else (role, pattern, layout, f"x{len(names)}")
            for (role, pattern, layout), names in groups.items()
        ]
        return Columns(rows, "<<<<")

    def _sent(self) -> Columns:
        groups: dict[tuple[str, str, str], list[Conversion]] = {}
        for conversion in (*self.turns * self.conversions, *self.conversions_once):
            if conversion.sent:
                groups.setdefault((conversion.phase, conversion.kind, conversion.axis), []).append(conversion)
        if not groups:
            return Columns([["nothing"]], "<")
        rows = [
            (
                phase, kind, f"over {axis}", f"x{len(group)}", in_bytes(sum(c.sent for c in group)),
                in_seconds(sum(c.seconds for c in group)), f"first: {group[0].place or group[0].name}",
            )
            for (phase, kind, axis), group in groups.items()
        ]  # fmt: skip
        for axis, sent in self.bytes_per_axis.items():
            once = self.conversions_once if self.turns > 1 else ()
            group = [c for c in (*self.turns * self.conversions, *once) if c.axis == axis and c.sent]
            seconds = in_seconds(sum(c.seconds for c in group))
            rows.append(("total", "", f"over {axis}", f"x{len(group)}", in_bytes(sent), seconds, ""))
        return Columns(rows, "<<<>>><")

    def _dearest(self) -> Columns:
        """The conversions that take longest, with their causes. Those of repeated layers have one line."""
        groups: dict[tuple[str, ...], list[Conversion]] = {}
        for one in self.conversions:
            if one.sent:
                pattern, place = (re.sub(r"\.\d+(?=\W|$)", ".*", text) for text in (one.cause, one.place))
                groups.setdefault((one.phase, f"{one.kind} over {one.axis}", place, pattern), []).append(one)
        ordered = sorted(groups.items(), key=lambda group: -sum(one.seconds for one in group[1]))
        rows = [
            (
                in_seconds(sum(one.seconds for one in group)), f"x{len(group)}" if len(group) > 1 else "", kind, phase,
                group[0].cause if len(group) == 1 else cause, group[0].place if len(group) == 1 else place,
            )
            for (phase, kind, place, cause), group in ordered[:DEAREST]
        ]  # fmt: skip
        return Columns(rows, ">><<<<")

    def _tried(self) -> Columns:
        groups: dict[tuple[str, str], list[Tried]] = {}
        for one in self.tried:
            if not one.replicated:
                groups.setdefault((one.operator, one.rule), []).append(one)
        rows = [(name, rule, f"x{len(group)}", f"first: {group[0].place}") for (name, rule), group in groups.items()]
        return Columns(rows, "<<><")

    def _replicated(self) -> Columns:
        groups: dict[tuple[str, str], list[Tried]] = {}
        for one in self.tried:
            if one.replicated:
                groups.setdefault((one.operator, one.replicated), []).append(one)
        rows = [
            (
                name, f"x{len(group)}", in_seconds(sum(one.seconds for one in group)),
                f"and gathers of {in_bytes(sum(one.gathered for one in group))}",
                in_seconds(sum(one.gather_seconds for one in group)), f"first: {group[0].place}", why,
            )
            for (name, why), group in groups.items()
        ]  # fmt: skip
        return Columns(rows, "<>><><<")
