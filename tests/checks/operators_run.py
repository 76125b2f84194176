"""Which operators of torch a function runs, whoever calls them: what a step does, whatever the machine's load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

_NAMES = """
view _unsafe_view t transpose permute expand expand_as detach alias slice select unsqueeze squeeze as_strided split
split_with_sizes unbind unfold narrow reshape view_as unflatten flatten _reshape_alias lift_fresh empty empty_strided
empty_like new_empty to contiguous result_type resolve_conj resolve_neg item is_nonzero _local_scalar_dense set_ resize_
dropout
"""
_NO_WORK = frozenset(_NAMES.split())
"""Views, allocations, and what looks at a tensor without reading it."""

COPY = "copy_"


def operators_run(function: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """The kernels that a function runs on this thread, by name, in forward and backward; and its collectives.

    A kernel is an operator of ATen that calls no other which works: `mm`, not `linear`; `copy_`, not `clone`.
    """
    with profile(activities=[ProfilerActivity.CPU]) as found:
        function()
    kernels, collectives = Counter[str](), Counter[str]()
    for event in found.events() or ():
        if event.name.startswith("c10d::"):
            collectives[event.name.removeprefix("c10d::")] += 1
        elif _works(event.name) and not any(_works(child.name) for child in event.cpu_children):
            kernels[event.name.removeprefix("aten::")] += 1
    return kernels, collectives


def _works(name: str) -> bool:
    return name.startswith("aten::") and name.removeprefix("aten::") not in _NO_WORK
