"""Advice: changes of a request that would make a step faster, each planned again to tell its effect.

half the batch, twice the batch     the model is captured again
a neighbouring mesh                 a factor moves from one axis to another, or two axes change places
twice or half the micro-batches     the batch is divided again
no bound on memory                  what the bound costs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from shardc.errors import ShardcError
from shardc.explain.summarised import summary_of
from shardc.explain.summary import Summary
from shardc.ir.mesh import Mesh
from shardc.ir.printing import in_bytes, in_seconds
from shardc.options import UNBOUNDED
from shardc.passes.capture import TRACING
from shardc.passes.pipeline import LOCAL, part, run
from shardc.planning.compilation import Compilation
from shardc.planning.gc_pause import gc_paused
from shardc.planning.scheduled import step_seconds

DIVIDED = "micro-batches"
MOST = 3
"""So many changes are told."""
LITTLE = 0.005
"""By this part a change has to raise tokens a second to be told."""
SAVED = 0.1
"""By this part another number of micro-batches has to lower what a device holds to be told though it is no faster."""

Rest = Callable[[dict[str, Compilation]], Mapping[str, Compilation]]
"""Runs the passes behind `LOCAL`: from what the passes until then left to what all leave."""


def scheduled_alone(snapshots: dict[str, Compilation]) -> Mapping[str, Compilation]:
    """The passes behind `LOCAL`, as they stand in the list."""
    run(part("schedule", "overlap"), snapshots[LOCAL], snapshots)
    return snapshots


@dataclass(frozen=True)
class Advice:
    """A change of what was asked, the summary of the best plan with it, and by what part it raises the tokens or
    samples a second: 0.1 for 10 % more."""

    change: str
    summary: Summary
    gain: float
    saved: float = 0.0
    """Bytes that a device holds less at its peak."""

    def __str__(self) -> str:
        one = self.summary
        effect = f"{self.gain:+.1%} {one.unit} a second" if one.rows else f"{self.gain:+.1%} steps a second"
        less = f", {in_bytes(self.saved)} less" if self.saved >= SAVED * (one.held + self.saved) else ""
        return f"{self.change}: {effect} ({in_seconds(one.seconds)} a step, {in_bytes(one.held)} a device{less})"


def advice_on(snapshots: Mapping[str, Compilation], rest: Rest = scheduled_alone) -> tuple[Advice, ...]:
    """The changes that help most, the best first; then the number of micro-batches that saves most memory, if it is
    none of them; empty where nothing helps. `snapshots` has the compilation after every pass. Every change is planned,
    which takes as long as the plan did."""
    now = snapshots["overlap"]
    before = summary_of(now, step_seconds(now))
    found: list[Advice] = []
    for change, plan in _changes(snapshots, before, rest):
        try:
            with gc_paused():
                c = plan()
        except ShardcError:  # what does not fit, or breaks a constraint, is no advice
            continue
        after = summary_of(c, step_seconds(c))
        text = change.replace("{held}", in_bytes(after.held))
        found.append(Advice(text, after, _pace(after) / _pace(before) - 1.0, max(before.held - after.held, 0.0)))
    helping = sorted((one for one in found if one.gain >= LITTLE), key=lambda one: -one.gain)[:MOST]
    smaller = [
        one for one in found if DIVIDED in one.change and one.saved >= SAVED * before.held and one not in helping
    ]
    return (*helping, *sorted(smaller, key=lambda one: -one.saved)[:1])


def _pace(summary: Summary) -> float:
    """Rows a second, or steps."""
    return (summary.rows or 1) / summary.seconds


def _changes(
    snapshots: Mapping[str, Compilation], now: Summary, rest: Rest
) -> Iterator[tuple[str, Callable[[], Compilation]]]:
    """Changes in words, and the function that plans with each."""
    c, whole = snapshots["microbatch"], snapshots.get("factor")

    def planned(first: str, changed: Compilation) -> Compilation:
        made = dict(snapshots)
        run(part(first, LOCAL), changed, made)
        return rest(made)["overlap"]

    for mesh in _neighbours(c.mesh):
        yield f"mesh {mesh} in place of {c.mesh}", lambda mesh=mesh: planned("retile", replace(c, mesh=mesh))
    if now.memory_binds:
        free = replace(c, options=replace(c.options, memory=UNBOUNDED, optimizer=_optimizer(c)))
        yield (
            f"room for {{held}} a device in place of {in_bytes(now.bound or 0.0)}",
            lambda: planned("retile", free),
        )
    turns = c.program.turns
    for count in (2 * turns, turns // 2) if c.program.trained else ():
        if count and whole is not None:
            asked = replace(whole, options=replace(c.options, microbatches=count))
            yield f"{count} {DIVIDED} in place of {turns}", lambda asked=asked: planned("microbatch", asked)
    if not c.dims and now.rows:
        for words, rows in (("twice the batch", lambda n: 2 * n), ("half the batch", lambda n: n // 2)):
            yield words, lambda rows=rows: planned("normalize", _captured_again(c, rows))


def _optimizer(c: Compilation) -> str | float | None:
    """The optimizer that is reckoned with, named: by default it depends on the bound."""
    return c.options.optimizer if c.options.optimizer is not None else c.states.name or None


def _captured_again(c: Compilation, rows: Callable[[int], int]) -> Compilation:
    with TRACING, torch.set_grad_enabled(bool(c.program.trained)):
        return run(part("capture", "capture"), replace(c, call=c.example.example(rows)))


def _neighbours(mesh: Mesh) -> list[Mesh]:
    """The meshes of as many devices that are next to one: its smallest factors moved, or its axes turned round."""
    found: dict[Mesh, None] = {}
    for source, ways in mesh.axes:
        prime = next((n for n in range(2, ways + 1) if ways % n == 0), 0)
        for target in mesh.names:
            if prime and target != source:
                moved = {**mesh.sizes, source: ways // prime, target: mesh.sizes[target] * prime}
                found[Mesh(tuple((axis, moved[axis]) for axis in mesh.names))] = None
    found[Mesh(mesh.axes[::-1])] = None
    found.pop(mesh, None)
    return list(found)
