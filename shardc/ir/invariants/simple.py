"""What holds once a local program was simplified."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from shardc.ir.facts import lowered
from shardc.ir.invariants.invariant import Broken, Checked, Invariant, invariant
from shardc.runtime.kernels.random import DRAWS

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.expand.default, aten.permute.default)


@invariant
def what_is_computed_is_read(checked: Checked) -> Iterator[Broken]:
    """Every call has a reader; draws need none, and of several results one may have none."""
    for node in checked.calls:
        if not node.users and node.target not in DRAWS and node.target is not operator.getitem:
            yield Broken(node, "has no reader")


@invariant
def views_change_something(checked: Checked) -> Iterator[Broken]:
    """No view has the shape and the order of dims of what it views, but for one that is an output."""
    returned = {node for _, node in checked.outputs}
    for node in checked.calls:
        if node.target not in _VIEWS or lowered(node).operator is not None or node in returned:
            continue
        before, after = checked.layout(checked.operands[node][0]), checked.layout(node)
        if _keeps_order(node) and before is not None and after is not None and checked.lies_as(before, after):
            yield Broken(node, f"makes {after} of the same")


def _keeps_order(node: fx.Node) -> bool:
    dims: Any = node.args[1]
    return node.target is not aten.permute.default or list(dims) == sorted(dims)


SIMPLE: tuple[Invariant, ...] = (what_is_computed_is_read, views_change_something)
