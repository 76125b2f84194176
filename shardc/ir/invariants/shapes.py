"""What holds of the shapes that operators make, of global values before localize and of a rank's parts after it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import fx

from shardc.ir.facts import lowered
from shardc.ir.invariants.inference import Described, Failure, Inferred, disagreements
from shardc.ir.invariants.invariant import Broken, Checked, Invariant, invariant
from shardc.ir.layout import Layout
from shardc.ir.precision import RUNS_AS
from shardc.runtime.kernels import indexing

aten = torch.ops.aten
_SIZED = (aten.view.default, aten.expand.default)


@invariant
def global_shapes_follow(checked: Checked) -> Iterator[Broken]:
    """An operator or view, run on the global shapes of its operands, makes the global shape and the dtype that its
    layout tells."""
    yield from _follow(checked, local=False)


@invariant
def conversions_keep_the_value(checked: Checked) -> Iterator[Broken]:
    """A conversion or view is of the value of the captured program that its operand is of."""
    for node in checked.calls:
        if lowered(node).operator is None and node.target is not operator.getitem:
            (operand,) = checked.operands[node]
            if lowered(node).base != lowered(operand).base:
                yield Broken(node, f"is of another value than its operand %{operand.name}")


@invariant
def sizes_are_local(checked: Checked) -> Iterator[Broken]:
    """The sizes that a view or an expansion names are those of the rank's part."""
    for node in checked.calls:
        layout = checked.layout(node)
        if node.target in _SIZED and lowered(node).operator is None and layout is not None:
            sizes: Any = node.args[1]
            if tuple(sizes) != layout.local_shape(checked.mesh):
                yield Broken(node, f"names sizes {list(sizes)}, a part is {list(layout.local_shape(checked.mesh))}")


@invariant
def local_shapes_follow(checked: Checked) -> Iterator[Broken]:
    """An operator or view, run on the rank's parts of its operands, makes the part and the dtype that its layout
    tells; with a dummy row where one is to be dropped."""
    yield from _follow(checked, local=True)


def _follow(checked: Checked, local: bool) -> Iterator[Broken]:
    def described(node: fx.Node) -> Described | None:
        facts = lowered(node)
        if facts.layout is None or facts.dtype is None:
            return None
        return Described(_shape(checked, node, facts.layout, local), facts.dtype)

    def compared(node: fx.Node, made: Inferred) -> Iterator[Broken]:
        if isinstance(made, Failure):
            yield Broken(node, f"cannot run on its operands: {made.reason}")
        elif isinstance(made, Described):
            if made != described(node):
                yield Broken(node, _differs(made, described(node)))
        elif made is not None:
            for user in node.users:
                one: Any = made[user.args[1]] if user.target is operator.getitem else None  # type: ignore[index]
                if one is not None and one != described(user):
                    yield Broken(user, _differs(one, described(user)))

    for node in checked.calls:
        yield from disagreements(node, described, checked.device, partial(compared, node))


def _shape(checked: Checked, node: fx.Node, layout: Layout, local: bool) -> tuple[int, ...]:
    shape = layout.local_shape(checked.mesh) if local else layout.shape
    dummies = [user for user in node.users if user.target is indexing.drop_dummy]
    for one in (*dummies, *([node] if node.target is indexing.pad_dummy else [])):
        dim: Any = one.kwargs["dim"]
        return (*shape[:dim], shape[dim] + 1, *shape[dim + 1 :])
    return shape


def _differs(made: Described, told: Described | None) -> str:
    assert told is not None
    if made.shape != told.shape:
        return f"makes the shape {list(made.shape)}, its layout tells {list(told.shape)}"
    return f"makes {made.dtype}, its facts tell {told.dtype}"


@invariant
def only_what_runs_is_left(checked: Checked) -> Iterator[Broken]:
    """Operators that only speak to the planner, `constrain` and `retile`, are gone."""
    for node in checked.calls:
        if node.target in (torch.ops.shardc.constrain.default, torch.ops.shardc.retile.default, *RUNS_AS):
            yield Broken(node, "runs nothing, and is still there")


@invariant
def split_factors_have_their_body(checked: Checked) -> Iterator[Broken]:
    """An operator one of whose parted factors is split has given way to the body of its variant, which is told of the
    parts; every other operator is what it was."""
    for node, chosen in checked.operators:
        target, parts = checked.once(("runs", chosen.alike), lambda c=chosen: c.runs(checked.mesh))
        if node.target != RUNS_AS.get(target, target):
            yield Broken(node, f"runs {node.target}, its strategy {target}")
        elif any(node.kwargs.get(name) != part for name, part in parts.items()):
            yield Broken(node, f"is to be told of {parts}, and is told {dict(node.kwargs)}")


GLOBAL: tuple[Invariant, ...] = (global_shapes_follow, conversions_keep_the_value)
LOCAL: tuple[Invariant, ...] = (
    only_what_runs_is_left, sizes_are_local, split_factors_have_their_body, local_shapes_follow,
)  # fmt: skip
