"""All sizes of one captured program, and the compilation of one call."""

from __future__ import annotations

import json
import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from shardc.analysis.sized_source import alike, samples, sized_source
from shardc.capture.dynamic_sizes import Template, named_dims, sizes_of
from shardc.capture.inputs import flatten
from shardc.compiled import Compiled
from shardc.decided import Decided, as_asked, decided
from shardc.distribution import check_data, check_world
from shardc.errors import ShardcError
from shardc.explain.plan_file.reading import PlanFile
from shardc.ir.mesh import Mesh
from shardc.ir.model_call import Dims, ModelCall
from shardc.options import AUTO, Options
from shardc.passes.capture import TRACING
from shardc.passes.pipeline import part, run
from shardc.planning.compilation import Compilation
from shardc.planning.gc_pause import gc_paused
from shardc.runtime import Executable, local_mesh
from shardc.runtime.execute.sizes import for_sizes

Sizes = Mapping[str, int]


def compiled(call: ModelCall, mesh: Mesh, options: Options, dims: Dims | None = None) -> Compiled:
    """Capture, plan and lower one call. The result serves all sizes of `dims` (None: of those that options name)."""
    options, _ = as_asked(options, mesh)
    check_world(mesh)
    check_data(options.data, mesh)
    dims = named_dims(options.dynamic, call) if dims is None else dims
    with TRACING, gc_paused():
        if dims:
            return Family(Compilation(call, mesh, options, dims)).at(call, flatten((call.args, dict(call.kwargs)))[0])
        return Compiled(decided(Compilation(call, mesh, options)))


ENOUGH = 2
"""Sizes that are lowered one by one, before a source for all is looked for."""

MOST_FREE = 3
"""Sizes that may differ on their own in one source: of more, it takes too many programs to find it."""


class Family:
    """What one captured program is at the sizes met so far.

    It is planned at the first; the others reuse the plan's strategies and are only lowered. From the third size on one
    source serves all sizes (`Sized`), if one can. Sizes that break an assumption of the model's code are captured on
    their own, and so are sizes of one, which broadcast. `planned` is a compilation of the same call without dynamic
    sizes, whose plan is reused; `planned_at` are its sizes, in words.
    """

    def __init__(self, asked: Compilation, planned: Compilation | None = None, planned_at: str = "") -> None:
        self._asked = replace(asked, call=asked.call.without_arguments())
        self._members: dict[tuple[int, ...], Compiled] = {}
        self._captured: Compilation | None = None
        self._template: Template | None = None
        self._planned, self._planned_at = planned, planned_at
        self._sized: list[Sized] = []
        self._met: dict[Remainders, int] = {}
        self._met_before = 0 if planned is None else 1

    def captured(self, call: ModelCall) -> Template:
        """The captured program; `call` is traced if it is the first. Raises CaptureError where its sizes are fixed."""
        if self._template is None:
            self._captured = run(part("capture", "capture"), replace(self._asked, call=call))
            self._template = Template(self._captured.program, self._asked.dims)
        return self._template

    def admits(self, leaves: Sequence[Any]) -> bool:
        """Whether the captured program is that of a call with these flat inputs, as far as sizes go."""
        try:
            sizes = sizes_of(self._asked.dims, leaves)
        except ShardcError:  # sizes that were equal in the calls before
            return False
        return min(sizes.values()) > 1 and (self._template is None or self._template.admits(sizes))

    def broken(self, call: ModelCall) -> str:
        """Why a call is not one of this program, sizes apart; "" if it is."""
        effects = self._captured.program.effects if self._captured else None
        return "" if effects is None else effects.broken((call.args, call.kwargs))

    def changes(self) -> frozenset[tuple[int, Any]]:
        """What has broken the guards until now, each as the identity of a container and a key in it."""
        effects = self._captured.program.effects if self._captured else None
        return frozenset() if effects is None else effects.changes()

    def at(self, call: ModelCall, leaves: Sequence[Any]) -> Compiled:
        """The program for the sizes of a call with these flat inputs."""
        sizes = sizes_of(self._asked.dims, leaves)
        key = tuple(sizes.values())
        if key in self._members:
            return self._members[key]
        if self._captured is None and min(sizes.values()) > 1:
            self.captured(call)
        if self._template is None or not self._template.admits(sizes) or self._undivided(leaves):
            options = self._asked.options
            options = replace(options, plan=None) if self._sizes_of_file() else options  # it is for the others
            alone = decided(replace(self._asked, call=call, dims={}, options=options))
            return self._members.setdefault(key, Compiled(alone, self))
        return self._by_one_source(self._template, sizes) or self._member(self._template, sizes)

    def _undivided(self, leaves: Sequence[Any]) -> bool:
        """Whether a batch does not divide into as many micro-batches as were chosen for others."""
        if self._asked.options.microbatches != AUTO or self._planned is None:
            return False
        rows = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)
        count = self._planned.options.microbatches
        return isinstance(count, int) and bool(rows % count)

    def _member(self, template: Template, sizes: Sizes) -> Compiled:
        key = tuple(sizes.values())
        if key not in self._members:
            self._members[key] = Compiled(self._lowered(template, sizes), self)
        return self._members[key]

    def _lowered(self, template: Template, sizes: Sizes) -> Decided:
        assert self._captured is not None
        if self._planned is None:
            self._plan_of_file(template, sizes)
        start = time.process_time()
        program = template.at(sizes)
        seconds = {} if self._members else self._captured.seconds
        seconds = {**seconds, "sizes": time.process_time() - start}
        c = replace(self._captured, program=program, seconds=seconds, sizes=sizes)
        found = decided(replace(c, reuse=self._planned, reuse_at=self._planned_at), part("normalize", "propagate"))
        assigned = found.snapshots["assign"]
        if self._planned is None or (not self._members and assigned.solution is not None):
            self._planned, self._planned_at = assigned, ", ".join(f"{k}={n}" for k, n in sizes.items())
        return found

    def _plan_of_file(self, template: Template, sizes: Sizes) -> None:
        """Lower at the sizes of the plan that the options name, if it has others, so that these reuse it."""
        there = self._sizes_of_file()
        if there.keys() == sizes.keys() and there != sizes and template.admits(there):
            self._lowered(template, there)

    def _sizes_of_file(self) -> Sizes:
        named = self._asked.options.plan
        return {} if named is None else PlanFile.read(named).sizes

    def _by_one_source(self, template: Template, sizes: Sizes) -> Compiled | None:
        """The program at these sizes by the source of many; None where these must be lowered on their own."""
        for sized in self._sized:
            if sized.serves(sizes):
                return sized.at(sizes)
        free = {one.name: sizes[one.name] for one in template.free}
        if len(free) > MOST_FREE:
            return None
        for divisor in dict.fromkeys((1, self._asked.mesh.size)):
            key = divisor, tuple(size % divisor for size in free.values())
            met = self._met.setdefault(key, self._met_before if divisor == 1 else 0)
            self._met[key] = met + 1
            if met == ENOUGH:
                sized = self._find(template, sizes, free, divisor)
                if sized is not None:
                    self._sized.append(sized)
                    return sized.at(sizes)
        return None

    def _find(self, template: Template, sizes: Sizes, free: Sizes, divisor: int) -> Sized | None:
        """The source for all sizes that leave what `sizes` do when they are divided; None where there is none."""
        like = self._member(template, sizes)
        try:
            found = self._search(template, like, free, divisor)
        except (ShardcError, AssertionError):  # a size that is tried may be one that no plan is for
            found = None
        mesh = local_mesh(self._asked.mesh.sizes)
        agreed = mesh.agreed("" if found is None else json.dumps(found))  # all ranks take the source of the first
        return Sized(like, template, *json.loads(agreed)) if agreed else None

    def _search(self, template: Template, like: Compiled, free: Sizes, divisor: int) -> Found | None:
        steps = {one.name: math.lcm(one.step, divisor) for one in template.free}
        chosen, checks = samples(free, steps, self._asked.mesh.size if divisor == 1 else 1)
        points, sources = [*chosen, *checks], [like.code]
        for point in points[1:]:
            source = self._source(template, point)
            if source is None or not alike(source, sources[0]):
                return None
            sources.append(source)
        source = sized_source(sources, points, len(chosen))
        if source is None:
            return None
        least = {name: size - (size - 2) // steps[name] * steps[name] for name, size in free.items()}
        smallest = self._source(template, least) if least != free else None
        if smallest is None or sized_source([*sources, smallest], [*points, least], len(chosen)) != source:
            least = dict(free)
        return source, steps, least, None if self._asked.options.budget is None else checks[0]

    def _source(self, template: Template, free: Sizes) -> str | None:
        """The source at some sizes; None where the captured program is not for them."""
        sizes = template.sizes_at(free)
        return None if sizes is None else self._lowered(template, sizes).snapshots["codegen"].code()


Remainders = tuple[int, tuple[int, ...]]
"""A divisor, and what every free size leaves."""

Found = tuple[str, Sizes, Sizes, Sizes | None]
"""A source, the steps between the sizes that it serves, the least of them, and the most (with a budget)."""

RECENT = 64
"""Sizes whose module is kept: it is made in a moment, but not for nothing."""


class Sized:
    """One source for many sizes: from `least` on in steps of `steps`, and up to `most` where memory is bounded."""

    def __init__(
        self, like: Compiled, template: Template, source: str, steps: Sizes, least: Sizes, most: Sizes | None
    ) -> None:
        self._like, self._template, self._source = like, template, source
        self._steps, self._least, self._most = steps, least, most
        self._module = for_sizes(source)
        self._mesh = local_mesh(like.plan.mesh.sizes)
        self._recent: OrderedDict[tuple[int, ...], Compiled] = OrderedDict()

    def serves(self, sizes: Sizes) -> bool:
        """Whether the source is for these sizes."""
        fits = all(sizes[n] >= least and not (sizes[n] - least) % self._steps[n] for n, least in self._least.items())
        return fits and (self._most is None or all(sizes[name] <= most for name, most in self._most.items()))

    def at(self, sizes: Sizes) -> Compiled:
        """The program at these sizes."""
        key = tuple(sizes[name] for name in self._least)
        if key not in self._recent:
            module = self._like.prepared(self._module({name: sizes[name] for name in self._least}))
            program = self._template.sized(self._like.program, sizes)
            self._recent[key] = self._like.for_sizes(program, self._source, Executable(module, self._mesh))
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(key)
        return self._recent[key]
