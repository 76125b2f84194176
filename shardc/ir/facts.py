"""What is known of a node: one dataclass a stage, under one key of fx's `node.meta`.

    captured(node).value      from capture to retile: the global value, and where it comes from
    lowered(node).layout      from reshard on: how it lies, and of which value of the captured program it is a part

Facts are frozen. A pass that learns more gives a node new facts; nobody else's change.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import fx

from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh

Key = tuple[fx.Node, int]
"""A value of the captured program: the node that makes it, and which of the node's results it is."""

FACTS = "facts"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where in the user's program a node comes from: the path of the module (`""` for the root), `file.py:41`, and
    `forward` or `backward` (`""` for placeholders)."""

    module: str = ""
    source: str = ""
    phase: str = ""


NOWHERE = Origin()


@cache
def origin(module: str, source: str, phase: str = "") -> Origin:
    """The one object for a place: a deep model has many nodes and few places."""
    return Origin(module, source, phase)


@dataclass(frozen=True, slots=True)
class Captured:
    """A node of the program as one device runs it.

    `value` is the fake tensor (or a tuple of them) with global shape and dtype; `strides` are those that eager mode
    gives it, where a decomposition does not.
    """

    value: Any
    origin: Origin = NOWHERE
    strides: tuple[int, ...] | None = None


class ChosenStrategy(Protocol):
    """An operator with its strategy, as invariants ask it (`shardc.rules.factors.chosen.Chosen`)."""

    @property
    def alike(self) -> Hashable:
        """What operators have in common whose answers to all below are the same."""
        ...

    def operand_layouts(self, mesh: Mesh) -> Sequence[Layout]:
        """Per tensor operand the layout that it must have."""
        ...

    def result_layouts(self, mesh: Mesh) -> Mapping[int, Layout]:
        """Per result the layout that it has."""
        ...

    def sums(self, axis: str, operands: frozenset[int]) -> bool:
        """Whether it may read just these operands as addends over an axis."""
        ...

    def runs(self, mesh: Mesh) -> tuple[Any, Mapping[str, Any]]:
        """What a rank runs in its place, itself or a body, and the parts that this is told of."""
        ...


@dataclass(frozen=True, slots=True)
class Lowered:
    """A node of the program with layouts. Where an operator has several results, its own `layout` and `dtype` are None:
    they are in the facts of the `getitem` nodes.

    `base` is the value of the captured program that it is, or is a view of; of a bucket its `members` are these.
    `kept`: forward leaves it for backward. `operator` is None for conversions, views and results taken out.
    """

    origin: Origin
    dtype: torch.dtype | None = None
    layout: Layout | None = None
    base: Key | None = None
    operator: ChosenStrategy | None = None
    kept: bool = False
    members: tuple[Key, ...] = ()


def captured(node: fx.Node) -> Captured:
    """The facts of a node of the captured program."""
    return node.meta[FACTS]


def lowered(node: fx.Node) -> Lowered:
    """The facts of a node of a lowered program."""
    return node.meta[FACTS]


def origin_of(node: fx.Node) -> Origin:
    """Where a node comes from, at any stage; nowhere for the output."""
    return node.meta[FACTS].origin if FACTS in node.meta else NOWHERE


def layer_of(node: fx.Node) -> str:
    """The repeated layer that a node comes from, `model.layers.3`; "" outside of all."""
    return _layer(origin_of(node).module)


@cache
def _layer(module: str) -> str:
    head, _, number = module.partition(".")
    while number:
        one, _, rest = number.partition(".")
        head = f"{head}.{one}"
        if one.isdigit():
            return head
        number = rest
    return head if head.isdigit() else ""


def describe(node: fx.Node, facts: Captured | Lowered) -> None:
    """Give a node its facts."""
    node.meta[FACTS] = facts


def laid(node: fx.Node) -> Layout:
    """The layout of a node that is one tensor."""
    layout = lowered(node).layout
    assert layout is not None, f"%{node.name} has several results and no layout of its own"
    return layout


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a node that is one tensor."""
    dtype = lowered(node).dtype
    assert dtype is not None, f"%{node.name} has several results and no dtype of its own"
    return dtype
