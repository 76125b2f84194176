"""The list of passes, in order, and the one function that runs them, or a part of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

from shardc.ir import verifier
from shardc.passes.assign import assign
from shardc.passes.bucket import bucket
from shardc.passes.capture import capture
from shardc.passes.codegen import codegen
from shardc.passes.factor import factor
from shardc.passes.localize import localize
from shardc.passes.microbatch import microbatch
from shardc.passes.normalize import normalize
from shardc.passes.overlap import overlap
from shardc.passes.propagate import propagate
from shardc.passes.reshard import reshard
from shardc.passes.retile import retile
from shardc.passes.schedule import schedule
from shardc.passes.simplify import simplify
from shardc.planning.compilation import Compilation, Pass
from shardc.runtime.execute.ambient import no_autocast

PIPELINE: tuple[Pass, ...] = (
    capture, normalize, factor, microbatch, retile, propagate, assign, reshard, localize, simplify, schedule, bucket,
    overlap, codegen,
)  # fmt: skip
NAMES: tuple[str, ...] = tuple(one.name for one in PIPELINE)


def part(first: str, last: str) -> tuple[Pass, ...]:
    """The passes from `first` to `last`, both included."""
    return PIPELINE[NAMES.index(first) : NAMES.index(last) + 1]


LOCAL = NAMES[NAMES.index("schedule") - 1]
"""The last pass before buckets and order are chosen: it leaves what a rank computes."""

LOWERING = part("reshard", "simplify")
"""What it takes to know what a choice holds in memory."""


def run(passes: Sequence[Pass], c: Compilation, snapshots: dict[str, Compilation] | None = None) -> Compilation:
    """Run passes one after another. `snapshots` gets what each left, by its name. Raises VerificationError where one
    leaves what breaks an invariant, if programs are to be verified (see `shardc.ir.verifier`)."""
    known = verifier.Known()
    for one in passes:
        start = time.process_time()
        # the user's autocast is for the model's own code: what capture wrote has its casts
        with nullcontext() if one is capture else no_autocast():
            c = one.run(c)
            if c.has("lowered"):
                c.lowered.write()  # written here, so that its time counts for the pass that asked for it
        seconds = c.seconds.get(one.name, 0.0) + time.process_time() - start
        c = replace(c, seconds={**c.seconds, one.name: seconds})
        if verifier.wanted():
            verified(one.name, c, known)
        if snapshots is not None:
            snapshots[one.name] = c
    return c


def verified(name: str, c: Compilation, known: verifier.Known) -> None:
    """Check the invariants of what the pass called `name` left, if it is one of the list, and if they are not known to
    hold. What `assign` lowered and measured comes by here once more: a version that was right when it was made, and
    that a pass took since, is not written again to be checked."""
    if name not in NAMES:
        return
    stage = _stage_after(name)
    version = c.lowered if c.has("lowered") else c.program.version
    before = version.holds.get(stage)
    if before is not None and before[0] is c.program:
        if version.taken and not c.has("code"):
            return
        known.take(before[1])
    source = c.code() if c.has("code") else ""
    with no_autocast():
        verifier.verify(name, stage, version.read(), c.program, c.mesh, source, known)
    version.holds[stage] = c.program, known.copy()


def _stage_after(name: str) -> str:
    """The stage at which a pass leaves a program: one that the verifier does not list leaves it where it was."""
    before = reversed(NAMES[: NAMES.index(name) + 1])
    return next(verifier.STAGE_AFTER[earlier] for earlier in before if earlier in verifier.STAGE_AFTER)
