"""The ranking that a search makes: what was planned, the fastest first, why the others lose, and what was not tried."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shardc.explain.summary import Summary
from shardc.ir.mesh import Mesh
from shardc.ir.printing import in_bytes, in_seconds
from shardc.ir.report import Columns, Report, Section

COMPUTING, TOO_LARGE = "computing", "does not fit"
REPEATED = 1.3
"""By this factor more arithmetic than the best plan has, with the same rows, is work that devices repeat."""


@dataclass(frozen=True)
class Candidate:
    """One way: a mesh, a number of micro-batches, and the rows of a step's batch (dim 0 of the first input). `cost` are
    the seconds a step of its best plan, `lower_bound` those that none beats, `held` the bytes that a device holds at
    most, `spent` CPU-seconds. Without a plan `cost` is infinite, `remark` says why, and `held` is the least that was
    found."""

    mesh: Mesh
    microbatches: int
    batch: int
    optimizer: str
    """The optimizer that is reckoned with, where another than the one asked for; else ""."""
    cost: float
    lower_bound: float
    held: float
    spent: float
    remark: str = ""
    summary: Summary | None = None
    near: bool = False
    """Whether `lower_bound` is that of plans near this one alone: there were too many strategies to offer all."""

    @property
    def gap(self) -> float:
        """By how much a better plan could beat this one, at most, as a part of its cost."""
        return (self.cost - self.lower_bound) / self.cost if math.isfinite(self.cost) and self.cost else 0.0

    @property
    def seconds(self) -> float:
        """The predicted seconds of a step; infinite without a plan."""
        return math.inf if self.summary is None else self.summary.seconds

    @property
    def pace(self) -> float:
        """Rows of the batch a second (steps, where there is no batch); 0 without a plan."""
        return (self.batch or 1) / self.seconds if self.seconds else math.inf


@dataclass(frozen=True)
class MeshSearch:
    """What was tried, the fastest first: by tokens (or samples) a second. `print(search)` shows the table."""

    hardware: str
    devices: int
    ranked: tuple[Candidate, ...]
    shared: float
    """CPU-seconds of what all ways share: capture, normalize, factor."""
    untried: tuple[str, ...] = ()
    """What was not tried, and why."""

    @property
    def best(self) -> Mesh:
        """The mesh of the fastest plan."""
        return self.ranked[0].mesh

    @property
    def microbatches(self) -> int:
        """The micro-batches of the fastest plan."""
        return self.ranked[0].microbatches

    @property
    def batch(self) -> int:
        """The rows that a step of the fastest plan takes; 0 where the inputs have none."""
        return self.ranked[0].batch

    @property
    def optimizer(self) -> str:
        """The optimizer of the fastest plan, where it is another than the one asked for; else ""."""
        return self.ranked[0].optimizer

    def __str__(self) -> str:
        return str(self.report())

    def _repr_html_(self) -> str:
        return self.report().html()

    def report(self) -> Report:
        """What `print(search)` shows, in sections."""
        first = self.ranked[0]
        several = [
            ("batch", lambda one: str(one.batch), {one.batch for one in self.ranked}),
            ("micro-batches", lambda one: str(one.microbatches), {one.microbatches for one in self.ranked}),
            ("optimizer", lambda one: one.optimizer or "as asked", {one.optimizer for one in self.ranked}),
        ]  # fmt: skip
        shown = [(title, text) for title, text, values in several if len(values) > 1]
        unit = first.summary.unit if first.summary is not None and first.summary.rows else "steps"
        titles = ["mesh", *(title for title, _ in shown), f"{unit} a second", "a step", "gap", "MFU", "held", "CPU"]
        rows = [[*titles, "why not"]]
        for one in self.ranked:
            known = [str(one.mesh), *(text(one) for _, text in shown), *_figures(one), f"{one.spent:.1f} s"]
            rows.append([*known, one.remark or _slower(one, first)])
        meshes = len({one.mesh for one in self.ranked})
        number = f"{meshes} mesh{'es' if meshes > 1 else ''}"
        head = f"{number} of {self.devices} devices on {self.hardware}, the fastest plan first"
        tail = f"held: the most at any time on one device; capture, shared by all, {self.shared:.1f} s"
        sections = [Section("", Columns(rows, "<" + ">" * len(shown) + ">>>>>><"))]
        if first.summary is not None:
            does = [*(line.strip() for line in first.summary.figures()), *first.summary.parallelism.lines]
            sections.append(Section(self._best(), does))
        sections += [Section("not tried", self.untried)] if self.untried else []
        return Report([head], sections, [tail])

    def _best(self) -> str:
        several = f", {self.microbatches} micro-batches" if self.microbatches > 1 else ""
        batch = f", batch {self.batch}" if len({one.batch for one in self.ranked}) > 1 else ""
        return f"the best: {self.best}{several}{batch}" + (f", {self.optimizer}" if self.optimizer else "")


def _figures(one: Candidate) -> Iterator[str]:
    if one.summary is None:
        yield from ["-"] * 5
        return
    yield f"{one.summary.rate if one.summary.rows else one.pace:,.0f}"
    yield in_seconds(one.seconds)
    yield f"{one.gap:.1%} near it" if one.near else "optimal" if one.gap < 1e-6 else f"{one.gap:.1%}"
    yield f"{one.summary.mfu:.1%}"
    yield in_bytes(one.held)


def _slower(one: Candidate, best: Candidate) -> str:
    """What a plan takes longer for than the best, in a step of as many rows."""
    if one is best or one.summary is None or best.summary is None:
        return ""
    if one.pace > best.pace:
        return f"only {one.pace / best.pace - 1.0:.1%} faster"
    size = (best.batch or 1) / (one.batch or 1)
    here, there = _shares(one.summary), _shares(best.summary)
    more = {name: size * seconds - there.get(name, 0.0) for name, seconds in here.items()}
    worst = max(more, key=lambda name: more[name])
    if more[worst] <= 0.001 * best.seconds:
        return "about as fast"
    link = f" ({one.summary.links[worst]})" if worst in one.summary.links else ""
    return f"{worst}{link} takes {in_seconds(more[worst])} more{_because(one, best, worst, size)}"


def _because(one: Candidate, best: Candidate, worst: str, size: float) -> str:
    assert one.summary is not None and best.summary is not None
    if worst == COMPUTING and one.summary.memory_binds:
        return ", to fit into memory"
    if one.batch < best.batch:
        return f", in steps of {one.batch} rows"
    if one.microbatches > best.microbatches * max(one.batch / (best.batch or 1), 1.0):
        return f", in {one.microbatches} micro-batches"
    arithmetic = (size * each.spent.get("arithmetic", 0.0) for each, size in ((one.summary, size), (best.summary, 1.0)))
    here, there = arithmetic
    if worst == COMPUTING and there and here > REPEATED * there:
        return f": devices repeat what others compute, {here / there:.1f} times the work of the best"
    return ", also to fit into memory" if one.summary.memory_binds else ""


def _shares(summary: Summary) -> Mapping[str, float]:
    """The seconds of a step that a rank computes, and those that it loses on account of every axis."""
    lost = {axis: summary.spent[axis] for axis in summary.links}
    return {COMPUTING: sum(summary.spent.values()) - sum(lost.values()), **lost}
