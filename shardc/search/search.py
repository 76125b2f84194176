"""Search: which mesh, how many micro-batches and which batch make the fastest plan for a number of devices."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ParamSpec, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardc.errors import MeshError, ShardcError
from shardc.explain.plan_file.cache import WORTH, cached_at
from shardc.explain.records import keep_record, read_record
from shardc.inspect.progress import working
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import Inputs, ModelCall
from shardc.options import SearchOptions, as_keywords
from shardc.passes.capture import TRACING
from shardc.passes.pipeline import part, run
from shardc.planning.compilation import Compilation
from shardc.planning.out_of_memory import OutOfMemoryError, refuse_too_large
from shardc.search.batches import Batches, resized
from shardc.search.meshes import meshes
from shardc.search.ranking import TOO_LARGE, Candidate, MeshSearch
from shardc.search.ways import LITTLE, Ways, counts_to_try

Keywords = ParamSpec("Keywords")
CONSTRAIN = torch.ops.shardc.constrain.default
PAYS = 0.02
"""By this part twice the batch has to raise rows a second to be worth it."""
SLOW = 0.3
"""A mesh that is slower than the best by this part is not tried with a larger batch."""


class SearchMesh(Protocol[Keywords]):
    """`search_mesh` as type checkers see it: with the options as keywords."""

    def __call__(
        self, model: nn.Module, devices: int, example_inputs: Inputs, *args: Keywords.args, **options: Keywords.kwargs
    ) -> MeshSearch: ...


def search(call: ModelCall, devices: int, options: SearchOptions) -> MeshSearch:
    """`search_mesh` for a call, with its options in one."""
    if devices < 1 or not options.axes:
        raise MeshError(f"cannot spread {devices} devices over {len(options.axes)} axes; both must be 1 or more")
    if options.dynamic:
        raise ShardcError("dynamic= has no meaning for a search: name the sizes to plan for")
    if options.plan is not None:
        raise ShardcError("plan= has no meaning for a search: it looks for plans")
    if any(isinstance(parameter, DTensor) for parameter in call.model.parameters()):
        raise MeshError("the parameters are stored on a mesh already; search before the model is distributed")
    batches = Batches.of(call, options.batch)
    start = time.process_time()
    with working("capturing"):
        first = _captured(call, batches.first, devices, options)
    taken = time.process_time() - start
    kept = cached_at(
        replace(first["factor"], time_limit=options.time_limit),
        "search", devices, list(options.axes), list(options.optimizers), options.microbatches, options.batch,
    )  # fmt: skip
    if kept is not None and (found := read_record(kept, MeshSearch)) is not None:
        return replace(found, shared=taken)
    made = _Searched(call, devices, options, batches, first).ranking(taken)
    if kept is not None and sum(one.spent for one in made.ranked) >= WORTH:
        keep_record(kept, made)
    return made


def _captured(call: ModelCall, rows: int | None, devices: int, options: SearchOptions) -> dict[str, Compilation]:
    """What all ways share: what the passes leave that do not look at the mesh. `rows` None: those of the call."""
    call = call if rows is None else call.example(lambda _: rows)
    snapshots: dict[str, Compilation] = {}
    start = Compilation(call, Mesh(((options.axes[0], devices),)), options, time_limit=options.time_limit)
    with TRACING, resized(rows):
        captured = run(part("capture", "capture"), start, snapshots)
    run(part("normalize", "factor"), captured, snapshots)
    return snapshots


@dataclass
class _Searched:
    call: ModelCall
    devices: int
    options: SearchOptions
    batches: Batches
    first: dict[str, Compilation]
    undivided: str = ""
    fits: bool = False
    """Whether a plan was found."""

    def ranking(self, taken: float) -> MeshSearch:
        """Every optimizer that is allowed with the first batch, as long as memory binds; then larger batches with the
        best of them."""
        shared = self.first["factor"]
        annotated = bool(self.options.constraints) or any(
            node.target is CONSTRAIN for node in shared.program.graph.nodes
        )
        every = meshes(self.devices, self.options.axes, self.options.device, annotated)
        untried, candidates, first = list(self.untried(shared)), list[Candidate](), list[Candidate]()
        for optimizer in ("", *self.options.optimizers):
            if first and not _binds(first):
                of = f" at batch {self.batches.now}" if self.batches.most > self.batches.now else ""
                untried.append(f"{optimizer} in place of the optimizer: memory does not bind{of}")
                break
            tried = self._with(self.first, self.batches.now, optimizer, every)
            candidates += tried
            first = tried if not first or _fastest(tried).pace > (1.0 + LITTLE) * _fastest(first).pace else first
        best = _fastest(first)
        for rows in self.batches.larger():
            if not math.isfinite(best.seconds) and candidates:
                break
            near = [one.mesh for one in first if one.pace >= (1.0 - SLOW) * best.pace]
            near = list(dict.fromkeys(near))
            try:
                with working(f"capturing batch {rows}"):
                    captured = _captured(self.call, rows, self.devices, self.options)
            except ShardcError as error:  # as of a model that knows its batch
                untried.append(f"larger batches than {best.batch}: {str(error).splitlines()[0]}")
                break
            first = self._with(captured, rows, best.optimizer, near)
            candidates += first
            gain, left = _fastest(first).pace / best.pace - 1.0, len(every) - len(near)
            if left:
                untried.append(f"batch {rows} on {left} meshes, slower by {SLOW:.0%} or more than the best before")
            if gain < PAYS:
                why = f"which gains {gain:+.1%} on {best.batch}: less than {PAYS:.0%}"
                if math.isinf(_fastest(first).seconds):
                    why = f"which has no plan: {_fastest(first).remark}"
                untried.append(f"larger batches than {rows}, {why}")
                break
            best = _fastest(first)
        return self._made(candidates, best, taken, untried)

    def _with(
        self, captured: dict[str, Compilation], rows: int, optimizer: str, among: Sequence[Mesh]
    ) -> list[Candidate]:
        """A candidate for every way with a batch and an optimizer."""
        if optimizer:
            captured = {
                name: replace(c, options=replace(c.options, optimizer=optimizer)) for name, c in captured.items()
            }
        c = captured["factor"]
        if c.options.budget is not None:
            try:
                refuse_too_large(c, c.options.budget, self.devices)
            except OutOfMemoryError:
                if not self.fits and optimizer == ("", *self.options.optimizers)[-1]:
                    raise
                return [
                    Candidate(mesh, 1, rows, optimizer, math.inf, 0.0, 0.0, 0.0, f"{TOO_LARGE}, however it is split")
                    for mesh in among
                ]
        counts = counts_to_try(c, self.options.microbatches)
        ways = Ways(captured, rows, counts, optimizer)
        found = ways.tried(among)
        self.fits |= any(one.summary is not None for one in found)
        if ways.undivided:
            self.undivided = f"micro-batches: {ways.undivided}"
        return found

    def untried(self, c: Compilation) -> list[str]:
        """What a search leaves out before it plans anything."""
        told: list[str] = []
        if isinstance(self.options.microbatches, int):
            told.append(f"other numbers of micro-batches than {self.options.microbatches}, which was asked for")
        elif c.options.budget is None:
            told.append("micro-batches: they save memory, and memory is not bounded")
        else:
            told.append(f"more micro-batches where the bound on memory costs less than {LITTLE:.0%} of a step")
        if self.options.batch is None and self.batches.now:
            told.append(f"other batches than {self.batches.now}; batch='auto' tries larger ones while they pay")
        return told

    def _made(self, candidates: list[Candidate], best: Candidate, taken: float, untried: list[str]) -> MeshSearch:
        candidates.sort(key=lambda one: (one is not best, -one.pace, one.lower_bound, one.held))
        untried += [self.undivided] if self.undivided else []
        if math.isinf(candidates[0].cost):
            candidates.sort(key=lambda one: one.held or math.inf)
            way_out = "; a smaller batch or more devices would help" if TOO_LARGE in candidates[0].remark else ""
            raise ShardcError(
                f"no mesh of {self.devices} devices has a plan; {candidates[0].mesh}: {candidates[0].remark}{way_out}"
                + (f"; {self.undivided}" if self.undivided else "")
            )
        return MeshSearch(self.options.device.name, self.devices, tuple(candidates), taken, tuple(untried))


def _fastest(tried: Sequence[Candidate]) -> Candidate:
    return max(tried, key=lambda one: one.pace)


def _binds(tried: Sequence[Candidate]) -> bool:
    summary = _fastest(tried).summary
    return summary is None or summary.memory_binds


def _search_mesh(model: nn.Module, devices: int, example_inputs: Inputs, options: SearchOptions) -> MeshSearch:
    """Plan for every mesh of `devices` devices over at most the given axes, in their order, with the micro-batches that
    a bound on memory needs and the batches that are asked for, and rank the plans by tokens a second.

    The model is captured once a batch. Meshes that the hardware cannot tell apart are planned once: where no constraint
    names an axis, only its size and its links matter. A way whose bound lies above the best plan so far is not solved.
    The best plan is the one that `shard` and `compile` make for its mesh, micro-batches, batch and optimizer. Raises
    ShardcError, also where no mesh has a plan.
    """
    return search(ModelCall.of(model, example_inputs), devices, options)


def _search_function(options: Callable[Keywords, SearchOptions]) -> SearchMesh[Keywords]:
    return as_keywords("search_mesh", _search_mesh, SearchOptions)


search_mesh = _search_function(SearchOptions)
