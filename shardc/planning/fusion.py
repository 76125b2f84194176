"""Which operators run as one kernel where Inductor compiles the generated code: chains of elementwise ones.

%h = gelu(%x)          hands on %h, and does not write it: its one reader is elementwise
%y = mul(%h, %g)       reads %g alone from memory
%z = mm(%y, %w)

An operator of forward and one of backward never share a kernel. Whether a layout changes within a chain is not known
yet, and counts as if it did not.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch

from shardc.ir.facts import origin_of
from shardc.rules.factors.factored import Factored, Key, Kind, Op
from shardc.rules.factors.fused import ALONE, Fused
from shardc.rules.families.pointwise import UNTAGGED


def fuse(factored: Factored) -> Factored:
    """Say of every operator what the kernel does for it that it is in; written in place."""
    readers: dict[Key, list[Op | None]] = defaultdict(list)
    for op in factored.ops:
        for operand in op.operands:
            readers[operand.value.key].append(op)
    for node in factored.program.results:
        if node is not None:
            readers[factored.values[node].key].append(None)
    makers = {result.key: op for op in factored.ops for result in op.results}
    known: dict[tuple[Kind, Fused], Kind] = {}
    for op in [op for op in factored.ops if is_elementwise(op)]:
        keys = [operand.value.key for operand in op.operands]
        reads = frozenset(index for index, key in enumerate(keys) if not _share(makers.get(key), op))
        together = [_share(op, reader) for result in op.results for reader in readers[result.key]]
        fused = Fused(reads, any(together), not (together and all(together)))
        if fused != ALONE:
            op.kind = known.setdefault((op.kind, fused), replace(op.kind, fused=fused))
    return factored


def is_elementwise(op: Op) -> bool:
    """Whether an operator computes every element of its results of the same element of its operands."""
    target = op.node.target
    return isinstance(target, torch._ops.OpOverload) and (torch.Tag.pointwise in target.tags or target in UNTAGGED)


def _share(one: Op | None, other: Op | None) -> bool:
    """Whether two operators are in one kernel if the second reads what the first makes."""
    if one is None or other is None or not (is_elementwise(one) and is_elementwise(other)):
        return False
    return origin_of(one.node).phase == origin_of(other.node).phase
