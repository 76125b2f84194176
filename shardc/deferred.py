"""Gradients that are accumulated over several backwards and reduced once.

    c = compiled.snapshots        backward: %g = mm(...), %r = all_reduce(%g, axis=dp)
    deferred(c)                   backward: %g = mm(...)          epilogue, of the sum of all %g: all_reduce

The same plan is lowered a second time: what only makes gradients of parameters, from the first collective on, is a
program of its own, which runs once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shardc.analysis.memory import SUMS, memory_in_order
from shardc.analysis.reductions import deferral_of, epilogue, every_backward
from shardc.errors import InfeasibleError
from shardc.ir.printing import in_bytes
from shardc.ir.versions import GraphVersion
from shardc.passes.pipeline import LOCAL, part, run
from shardc.planning.compilation import Compilation


def deferred(snapshots: Mapping[str, Compilation]) -> dict[str, Compilation] | None:
    """What the passes leave of the same plan, with gradients that are reduced once; None where none is reduced.

    Raises InfeasibleError where a device cannot hold the sums of gradients beside what it holds already."""
    c = snapshots[LOCAL]
    graph = c.lowered.read()
    deferral = deferral_of(graph, c.program)
    if not deferral.cuts:
        return None
    last, program = epilogue(graph, deferral, c.program)
    once = replace(c, program=program, lowered=GraphVersion.of(last), draft=None)
    each, deferring = every_backward(graph, c.program, deferral)
    every = replace(c, program=deferring, lowered=GraphVersion.of(each), draft=None)
    _check_memory(every)
    found = dict(snapshots)
    run(part("schedule", "codegen"), replace(every, epilogue=run(part("schedule", "overlap"), once)), found)
    return found


def _check_memory(c: Compilation) -> None:
    budget = c.options.budget
    if budget is None:
        return
    memory = memory_in_order(c.lowered.read(), c.program, c.mesh, c.states)
    if memory.peak > budget:
        sums = memory.parts.get(SUMS, 0.0)
        raise InfeasibleError(
            f"a device may hold {in_bytes(budget)}, and gradients that are accumulated before they are reduced take "
            f"{in_bytes(sums)} more, {in_bytes(memory.peak)} in all; lift memory=, or reduce them at every backward"
        )
