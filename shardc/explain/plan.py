"""The plan: what was chosen, what it costs, and how sure we are. `print(plan)` is how people read it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from shardc.analysis.conversions import Conversion
from shardc.analysis.memory import Memory
from shardc.errors import ShardcError
from shardc.explain.explanations import Assumption, Conflict, Explainer, Why, WhyNot
from shardc.ir.constrain import Spec, serialise
from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh
from shardc.ir.printing import columns, in_bytes, in_seconds


@dataclass(frozen=True)
class Placed:
    """A tensor of interest to the user, with its layout."""

    role: str
    name: str
    dtype: str
    layout: Layout

    def __str__(self) -> str:
        return f"{self.role:<9} {self.name}  {self.dtype}{self.layout}"


@dataclass(frozen=True)
class Tried:
    """An operator without a rule of its own: the `rule` that trial found for it.

    Where none of its dims may be split, `replicated` says why, and every rank runs it whole, in `seconds`, after its
    operands were gathered, in `gather_seconds`, for which a rank sends `gathered` bytes.
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
    """Layouts, conversions, predicted seconds, and the proof: no plan in the search space costs under `lower_bound`.

    `cost` is the solver's objective, `compute` plus conversions; `phases` are CPU-seconds of the compiler; `notes` tell
    what the user should know (dims that could not be split, conflicting constraints).
    """

    mesh: Mesh
    hardware: str
    mode: str
    placed: tuple[Placed, ...]
    layouts: dict[str, Layout]
    conversions: tuple[Conversion, ...]
    compute: float
    cost: float
    lower_bound: float
    notes: tuple[str, ...]
    phases: dict[str, float]
    tried: tuple[Tried, ...] = ()
    explainer: Explainer | None = field(default=None, repr=False, compare=False)
    """Answers questions about the plan; it holds the whole problem, so it is not saved with the plan."""
    memory: Memory = field(default_factory=Memory)
    hidden: float = 0.0
    """Seconds of conversions beneath which something is computed."""

    def why(self, value: str) -> Why:
        """Why `value` lies as it does: who makes it, how every reader reads it and what conversions that takes, and the
        second-best layout. `value` is the path of a parameter or of a module (its output), `input:0`, or a name in
        `graph("reshard")`. Raises ShardcError, with near names, for a value that is not there."""
        return self._explained().why(value)

    def why_not(self, value: str, layout: Spec) -> WhyNot:
        """What the best plan would cost in which `value` lies as `layout`, written as plans print it
        (`f32[256@tp, 64]`) or as constraints are (`("tp", None)`, `tp,-`); or what stands against it. Solves again."""
        return self._explained().why_not(value, layout if isinstance(layout, str) else serialise(layout))

    def conflicts(self) -> tuple[Conflict, ...]:
        """Which demands (constraints, outputs that come back whole) and operators' limits cannot hold together unless a
        split dim is gathered or moved: minimal sets, no two with a constraint in common. Empty where what was demanded
        costs no more than the reduction of partial sums."""
        return self._explained().conflicts()

    def assumes(self) -> tuple[Assumption, ...]:
        """At which other sizes of the inputs the plan would do, and where it would pad; one a size that is split."""
        return self._explained().assumes()

    def check(self) -> float:
        """Proves anew, in seconds a step, what every plan of the search space costs at least, by a certificate and by
        code that shares nothing with the search (`shardc.solver.proof.certificate.check`).

        Plans of many equal layers hold their certificate; for others it is made when first asked for. Where that takes
        too long, it proves less than `lower_bound`, which the search has proved; never more than `cost`."""
        return self._explained().checked()

    def _explained(self) -> Explainer:
        if self.explainer is None:
            raise ShardcError(
                "this plan was loaded from a file, without the problem that it solves; compile the model again"
            )
        return self.explainer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "explainer": None}

    @property
    def bytes_per_axis(self) -> dict[str, float]:
        """Bytes that one rank sends over every axis in one forward and backward."""
        return {axis: sum(c.sent for c in self.conversions if c.axis == axis) for axis in self.mesh.names}

    @property
    def predicted(self) -> float:
        """Seconds of compute and of the conversions that were emitted, less what is hidden: how long a rank runs.

        This may lie below `cost`, which charges in full every conversion of a value, though several can share steps,
        and every conversion but a gradient's, though more is hidden. Or above: `cost` charges gradients their share of
        buckets that it takes to hold all of their kind, and takes all of backward to hide them.
        """
        return self.compute + sum(c.seconds for c in self.conversions) - self.hidden

    def __str__(self) -> str:
        sections = {
            "tensors": self._tensor_lines(),
            "sent, per rank and step": self._conversion_lines(),
            "rules found by trial": self._tried_lines(),
            "run whole on every rank, for want of a rule": self._replicated_lines(),
            "notes": list(self.notes),
        }
        head = f"plan for mesh {self.mesh} on {self.hardware}, mode={self.mode}"
        lines = [head, *self._time_lines(), *self._memory_lines()]
        for title, content in sections.items():
            if content:
                lines += ["", title, *(f"  {line}" for line in content)]
        slow = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.phases.items() if seconds >= 0.005)
        return "\n".join([*lines, "", f"compiled in {sum(self.phases.values()):.2f} CPU-seconds: {slow or 'nothing'}"])

    def _time_lines(self) -> list[str]:
        gap = (self.cost - self.lower_bound) / self.cost if self.cost else 0.0
        proof = "proven optimal" if gap < 1e-6 else f"within {gap:.1%} of the proven bound"
        if not self.lower_bound:
            proof = "no bound proven"
        communication = in_seconds(sum(c.seconds for c in self.conversions))
        parts = f"compute {in_seconds(self.compute)}, conversions {communication}"
        if in_seconds(self.hidden) != in_seconds(0.0):
            parts += f", of which {in_seconds(self.hidden)} hidden"
        if in_seconds(self.cost) == in_seconds(self.predicted):
            return [f"  predicted  {in_seconds(self.predicted)} a step, {proof}: {parts}"]
        why, more = "it charges in full the steps that conversions share", ", and hides none but gradients"
        if self.predicted > self.cost:
            why, more = "it takes buckets to hold more gradients than they do", ", and all of backward to hide them"
        why += more if self.hidden else ""
        return [
            f"  predicted  {in_seconds(self.predicted)} a step: {parts}",
            f"  objective  {in_seconds(self.cost)}, {proof}; {why}",
        ]

    def _memory_lines(self) -> list[str]:
        memory = self.memory
        if not memory.peak:
            return []
        largest = sorted(memory.parts.items(), key=lambda part: -part[1])
        parts = ", ".join(f"{label} {in_bytes(size)}" for label, size in largest)
        budget = f" of {in_bytes(memory.budget)}" if memory.budget is not None else ""
        return [f"  memory     {in_bytes(memory.peak)}{budget} at most, in {memory.half}: {parts}"]

    def _tensor_lines(self) -> list[str]:
        """Roles, names and layouts in columns; repeated layers once, with their count."""
        groups: dict[tuple[str, str, str], list[str]] = {}
        for one in self.placed:
            pattern = re.sub(r"\.\d+\.", ".*.", one.name)
            groups.setdefault((one.role, pattern, f"{one.dtype}{one.layout}"), []).append(one.name)
        rows = [
            (role, names[0], layout, "") if len(names) == 1 else (role, pattern, layout, f"x{len(names)}")
            for (role, pattern, layout), names in groups.items()
        ]
        return columns(rows, "<<<<") if rows else []

    def _conversion_lines(self) -> list[str]:
        groups: dict[tuple[str, str, str], list[Conversion]] = {}
        for conversion in self.conversions:
            if conversion.sent:
                groups.setdefault((conversion.phase, conversion.kind, conversion.axis), []).append(conversion)
        if not groups:
            return ["nothing"]
        rows = [
            (
                phase, kind, f"over {axis}", f"x{len(group)}", in_bytes(sum(c.sent for c in group)),
                in_seconds(sum(c.seconds for c in group)), f"first: {group[0].place or group[0].name}",
            )
            for (phase, kind, axis), group in groups.items()
        ]  # fmt: skip
        for axis, sent in self.bytes_per_axis.items():
            group = [c for c in self.conversions if c.axis == axis and c.sent]
            seconds = in_seconds(sum(c.seconds for c in group))
            rows.append(("total", "", f"over {axis}", f"x{len(group)}", in_bytes(sent), seconds, ""))
        return columns(rows, "<<<>>><")

    def _tried_lines(self) -> list[str]:
        groups: dict[tuple[str, str], list[Tried]] = {}
        for one in self.tried:
            if not one.replicated:
                groups.setdefault((one.operator, one.rule), []).append(one)
        rows = [(name, rule, f"x{len(group)}", f"first: {group[0].place}") for (name, rule), group in groups.items()]
        return columns(rows, "<<><") if rows else []

    def _replicated_lines(self) -> list[str]:
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
        return columns(rows, "<>><><<") if rows else []
