"""The plan: what was chosen, what it costs, and how sure we are. `print(plan)` is how people read it."""

from __future__ import annotations

from dataclasses import dataclass

from shardc.layout import Layout
from shardc.mesh import Mesh


@dataclass(frozen=True)
class Conversion:
    """One collective or local slice that the plan emits: `sent` bytes a rank over `axis`, in `seconds`."""

    kind: str
    axis: str
    name: str
    sent: float
    seconds: float
    phase: str
    place: str


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

    @property
    def bytes_per_axis(self) -> dict[str, float]:
        """Bytes that one rank sends over every axis in one forward and backward."""
        return {axis: sum(c.sent for c in self.conversions if c.axis == axis) for axis in self.mesh.names}

    def __str__(self) -> str:
        gap = (self.cost - self.lower_bound) / self.cost if self.cost else 0.0
        proof = "proven optimal" if gap < 1e-6 else f"within {gap:.1%} of the proven bound"
        communication = sum(c.seconds for c in self.conversions)
        lines = [
            f"plan for mesh {self.mesh} on {self.hardware}, mode={self.mode}: {_seconds(self.cost)} a step ({proof})",
            f"  compute {_seconds(self.compute)}, conversions {_seconds(communication)}",
            "",
            "tensors",
            *(f"  {line}" for line in _fold([str(p) for p in self.placed])),
            "",
            "conversions (per rank and step)",
            *(f"  {line}" for line in self._conversion_lines()),
        ]
        if self.notes:
            lines += ["", "notes", *(f"  {note}" for note in self.notes)]
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.phases.items())
        return "\n".join([*lines, "", f"compiled in {sum(self.phases.values()):.2f} CPU-s: {phases}"])

    def _conversion_lines(self) -> list[str]:
        groups: dict[tuple[str, str, str], list[Conversion]] = {}
        for conversion in self.conversions:
            if conversion.sent:
                groups.setdefault((conversion.phase, conversion.kind, conversion.axis), []).append(conversion)
        lines = [
            f"{phase:<9} {kind:<15} over {axis:<6} x{len(found):<4} {_bytes(sum(c.sent for c in found)):>10} "
            f"{_seconds(sum(c.seconds for c in found)):>10}   e.g. {found[0].place or found[0].name}"
            for (phase, kind, axis), found in groups.items()
        ]
        return lines or ["none: nothing is sent"]


def _fold(lines: list[str]) -> list[str]:
    """Repeated layers once: lines that differ only in a layer's number are shown as one, with the count."""
    import re

    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", line), []).append(line)
    return [lines[0] if len(lines) == 1 else f"{pattern}   x{len(lines)}" for pattern, lines in groups.items()]


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value / 1e-6:.2f} us" if value else "0 s"


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"
