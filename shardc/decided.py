"""Who decides a plan: a file that the user names, rank 0, an earlier process, or the solver."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from shardc import errors
from shardc.deferred import deferred
from shardc.distribution import agree_on_program
from shardc.errors import ShardcError
from shardc.explain.plan import Plan
from shardc.explain.plan_file import cache
from shardc.explain.plan_file.as_json import as_json
from shardc.explain.plan_file.reading import PlanFile
from shardc.explain.planned import plan_of
from shardc.ir.mesh import Mesh
from shardc.options import AUTO, Options
from shardc.passes.microbatch import microbatch
from shardc.passes.pipeline import LOCAL, part, run
from shardc.planning.compilation import Compilation, Pass
from shardc.planning.given.given import GivenPlan
from shardc.planning.out_of_memory import OutOfMemoryError
from shardc.planning.time_axis import counts_worth_trying
from shardc.runtime import DistributedMesh, local_mesh
from shardc.runtime.mesh.distributed import started

BEFORE = part("capture", "propagate")
"""The passes that pose the problem."""


class Decided(NamedTuple):
    """What every pass left, and the plan."""

    snapshots: dict[str, Compilation]
    plan: Plan


def as_asked(options: Options, mesh: Mesh | None) -> tuple[Options, Mesh | None]:
    """The options with those of the plan that they name, where they ask for nothing else; and its mesh, where there is
    none. Raises ShardcError for a plan of another mesh or of other options."""
    if options.plan is None:
        return options, mesh
    file = PlanFile.read(options.plan)
    options = replace(options, microbatches=1) if options.microbatches == AUTO else options  # the file knows
    if mesh is not None:
        file.check_mesh(mesh)
    return replace(options, **file.asked(options)), mesh or file.mesh


def decided(c: Compilation, passes: Sequence[Pass] = BEFORE) -> Decided:
    """Compile: run `passes`, then find the decisions, then run the rest. Where the number of micro-batches is to be
    chosen, rank 0 chooses it."""
    snapshots: dict[str, Compilation] = {"capture": c}
    if c.options.microbatches == AUTO:
        before = [one.name for one in passes].index(microbatch.name)
        c, passes = run(passes[:before], c, snapshots), passes[before:]
        c = replace(c, options=replace(c.options, microbatches=_agreed_count(c, passes, snapshots)))
    c = run(passes, c, snapshots)
    if c.reuse is not None:
        return _finished(c, snapshots)
    if started() > 1:
        mesh = local_mesh(c.mesh.sizes)
        assert isinstance(mesh, DistributedMesh)
        return _of_rank_0(c, snapshots, mesh)
    return decided_alone(c, snapshots)


def _agreed_count(c: Compilation, passes: Sequence[Pass], before: Mapping[str, Compilation]) -> int:
    """The number of micro-batches that all ranks take."""
    if c.reuse is not None and isinstance(c.reuse.options.microbatches, int):
        return c.reuse.options.microbatches
    if started() <= 1:
        return _fastest_count(c, passes, before)
    mesh = local_mesh(c.mesh.sizes)
    assert isinstance(mesh, DistributedMesh)
    if mesh.rank == 0:
        try:
            count = _fastest_count(c, passes, before)
        except Exception as error:
            mesh.agreed(json.dumps({"error": str(error), "kind": type(error).__name__}))
            raise
        mesh.agreed(json.dumps({"count": count}))
        return count
    told: dict[str, Any] = json.loads(mesh.agreed(""))
    _raise_told(told)
    return int(told["count"])


def _fastest_count(c: Compilation, passes: Sequence[Pass], before: Mapping[str, Compilation]) -> int:
    """The number of micro-batches of the fastest step that fits. More of them are tried while memory costs time, and
    until one more step is slower: each is planned as it would be alone, on what was captured once. Raises what the
    largest number raises if none fits."""
    if c.options.budget is None:
        return 1
    best, fastest, refused = 0, math.inf, None
    for count in counts_worth_trying(c.program):
        snapshots = dict(before)
        try:
            tried = run(passes, replace(c, options=replace(c.options, microbatches=count)), snapshots)
            plan = decided_alone(tried, snapshots).plan
        except OutOfMemoryError as error:
            refused = error
            continue
        except ShardcError:
            if count == 1:
                raise
            break  # what couples samples does so in any number of micro-batches
        if plan.predicted >= fastest:
            break
        best, fastest = count, plan.predicted
        if not plan.summary.memory_binds:
            break
    if not best:
        assert refused is not None
        raise refused
    return best


def _raise_told(told: Mapping[str, Any]) -> None:
    """Raise what rank 0 raised, if it did."""
    if "error" in told:
        raise getattr(errors, told["kind"], ShardcError)(told["error"])


def _finished(c: Compilation, before: dict[str, Compilation], given: GivenPlan | None = None) -> Decided:
    snapshots = dict(before)
    run(part("assign", LOCAL), replace(c, given=given), snapshots)
    snapshots = _scheduled(snapshots)
    return Decided(snapshots, plan_of(snapshots, _scheduled))


def _scheduled(snapshots: dict[str, Compilation]) -> dict[str, Compilation]:
    """What all passes leave, of what those up to `LOCAL` left. Micro-batches reduce their gradients once."""
    c = snapshots[LOCAL]
    once = deferred(snapshots) if c.program.microbatches is not None else None
    if once is None:
        run(part("schedule", "codegen"), c, snapshots)
    return once or snapshots


def decided_alone(c: Compilation, before: dict[str, Compilation]) -> Decided:
    """Find the decisions of a compilation after `propagate` in this process: those of a file, of the cache, or of the
    solver; and run the rest of the passes."""
    if c.options.plan is not None:
        return _finished(c, before, PlanFile.read(c.options.plan).given(c))
    path = cache.cached_at(c)
    file = None if path is None else cache.look(path)
    if file is not None:
        with suppress(Exception):  # whatever is wrong with the file, the program is planned again
            return _finished(c, before, file.decisions(c))
    found = _finished(c, before)
    if path is not None:
        cache.keep(path, found.plan)
    return found


def _of_rank_0(c: Compilation, before: dict[str, Compilation], mesh: DistributedMesh) -> Decided:
    """The plan of rank 0: the others do not solve. They raise what it raises, and all raise at once where their
    programs differ."""
    agree_on_program(c)
    if mesh.rank == 0:
        try:
            found = decided_alone(c, before)
        except Exception as error:
            mesh.agreed(json.dumps({"error": str(error), "kind": type(error).__name__}))
            raise
        mesh.agreed(json.dumps(as_json(found.plan)))
        return found
    text = mesh.agreed("")
    told: dict[str, Any] = json.loads(text)
    _raise_told(told)
    return _finished(c, before, PlanFile.parse(text, "the plan of rank 0").decisions(c))
