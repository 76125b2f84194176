"""Which tokens go to an expert: what can be shown of a gate in a traced graph.

A gate of an expert is zero, or false, for all tokens that did not choose it, where it is made of `ids == expert`, or is
a column of a matrix that is zero but where it was scattered to.

    G = zeros.scatter(-1, ids, top)      column 3 of G is zero for tokens whose ids are not 3
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from shardc.capture.experts.networks import is_tensor, operand, shape

aten: Any = torch.ops.aten
_COPIES = (aten.clone.default, aten._to_copy.default)
_PRODUCTS = (aten.mul.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_SUMS = (aten.any.dim, aten.any.dims, aten.sum.dim_IntList, aten.amax.default)
_NON_ZERO = (aten.ne.Scalar, aten.gt.Scalar)
_FILLED = (aten.full.default, aten.full_like.default, aten.new_full.default)
_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)

_CHOOSE = (aten.topk.default, aten.sort.default, aten.max.dim)

Run = tuple[str, int]
"""Dims that lie side by side, and how many elements they have together: tokens "t", a token's choices "j", experts "e".
Tokens are in their order."""


@dataclass(frozen=True)
class ChosenTokens:
    """A value that is zero where the `ids` do not name an expert, and what its dims are. `exact`: it is true, or one,
    where they do."""

    ids: fx.Node
    runs: tuple[Run, ...]
    exact: bool = False

    def at(self, runs: tuple[Run, ...], *, exact: bool = True) -> ChosenTokens:
        """The same with other dims."""
        return ChosenTokens(self.ids, runs, self.exact and exact)


def is_filled(node: Any, value: float) -> bool:
    """Whether a node is a constant: one number, or a tensor filled with one."""
    if isinstance(node, (int, float)):
        return node == value
    if not isinstance(node, fx.Node):
        return False
    if node.target in _FILLED or node.target is aten.scalar_tensor.default:
        filled = node.args[0 if node.target is aten.scalar_tensor.default else -1]
        return isinstance(filled, (int, float)) and float(filled) == value
    if node.target in _ZEROS:
        return value == 0
    return node.target in (aten.view.default, aten.expand.default, *_COPIES) and is_filled(node.args[0], value)


@dataclass(frozen=True)
class GateColumn:
    """The elements along a dim are the gates of one expert each."""

    node: fx.Node
    dim: int


Gate = fx.Node | GateColumn


@dataclass(frozen=True)
class Gates:
    """Asks of gates of one expert, which many `tokens` may choose."""

    tokens: int
    expert: int

    def chosen(self, gate: Gate) -> ChosenTokens | None:
        """What a gate, one number for each token, shows; None if it does not show outside of which ids it is zero."""
        found = self._column(gate.node, gate.dim, self.expert) if isinstance(gate, GateColumn) else self(gate)
        return found if found is not None and found.runs == _runs(("t", self.tokens)) else None

    def __call__(self, node: fx.Node) -> ChosenTokens | None:
        args: Any = node.args
        target: Any = node.target
        if target in _COPIES:
            return self(args[0])
        if target is aten.expand.default or (target is aten.div.Tensor and is_tensor(args[0])):
            return _inexact(self._aligned(args[:1], node))
        if target in _PRODUCTS:
            return _inexact(self._aligned(args, node))
        if target is aten.where.self and is_filled(args[2], 0):
            return _inexact(self._aligned(args[:2], node))
        if target in _NON_ZERO and args[1] == 0:
            return self._aligned(args[:1], node)
        if target is aten.view.default:
            return self._seen(self(args[0]), shape(node))
        if target is aten.eq.Scalar and args[1] == self.expert:
            return self._chosen(args[0])
        if target is aten.eq.Tensor and is_tensor(args[1]) and _counts(args[1], shape(node)[-1]):
            found = self._chosen(args[0]) if shape(args[0])[-1] == 1 else None
            return None if found is None else found.at(_runs(*found.runs, ("e", shape(node)[-1])))
        if target in (aten.scatter.src, aten.scatter.value, aten.scatter_add.default) and is_filled(args[0], 0):
            return self._scattered(node)
        if target is aten._softmax.default:
            return self._softmax(node)
        if target is aten.bmm.default:
            return self._product(node)
        return self._fewer_dims(node)

    def _fewer_dims(self, node: fx.Node) -> ChosenTokens | None:
        args: Any = node.args
        target: Any = node.target
        if target is aten.permute.default:
            return self._permuted(node)
        if target in _SUMS and is_tensor(args[0]) and args[1] is not None:
            return self._summed(node)
        if target is aten.select.int:
            return self._column(args[0], args[1], args[2])
        if target is aten.slice.Tensor:
            given: list[Any] = [*args[1:], *(0, 0, None, 1)[len(args) - 1 :]]
            dim, first, last, step = given
            cut = last == first + 1 and step == 1
            return self._column(args[0], dim, first) if cut else None
        if target is operator.getitem and args[0].target in (aten.unbind.int, aten.split.Tensor):
            several, number = args
            split = several.target is aten.split.Tensor
            dim = (*several.args, 0)[1 + split]
            return None if split and several.args[1] != 1 else self._column(several.args[0], dim, number)
        return None

    def _chosen(self, ids: fx.Node) -> ChosenTokens | None:
        """The ids themselves: one for each token, or some in the last dim."""
        source = ids
        while source.target in (aten.view.default, *_COPIES):
            source = operand(source)
        size = math.prod(shape(source))
        if size == self.tokens:
            runs = _runs(("t", size))
        elif shape(source) and size == self.tokens * shape(source)[-1]:
            runs = _runs(("t", self.tokens), ("j", shape(source)[-1]))
        else:
            return None
        return self._seen(ChosenTokens(source, runs, exact=True), shape(ids))

    def _aligned(self, operands: Sequence[Any], node: fx.Node) -> ChosenTokens | None:
        """One of the operands of an operator by elements whose zeros are those of the result."""
        size = math.prod(shape(node))
        full = (one for one in operands if is_tensor(one) and math.prod(shape(one)) == size)
        return next((found for one in full if (found := self(one)) is not None), None)

    def _seen(self, found: ChosenTokens | None, dims: tuple[int, ...]) -> ChosenTokens | None:
        """What a view shows, if it leaves runs as they are."""
        return None if found is None or _dims_of(found.runs, dims) is None else found

    def _scattered(self, node: fx.Node) -> ChosenTokens | None:
        _, dim, ids, *_ = node.args
        last = len(shape(node)) - 1
        if last < 0 or dim % (last + 1) != last or shape(ids)[:-1] != shape(node)[:-1]:  # type: ignore[operator, arg-type]
            return None
        found = self._chosen(ids)  # type: ignore[arg-type]
        whole = _runs(("t", self.tokens), ("e", shape(node)[-1]))
        return None if found is None or math.prod(shape(node)[:-1]) != self.tokens else ChosenTokens(found.ids, whole)

    def _softmax(self, node: fx.Node) -> ChosenTokens | None:
        """Of scores that are minus infinity but where something was scattered to."""
        filled, dim, *_ = node.args
        while filled.target in _COPIES:  # type: ignore[union-attr]
            filled = filled.args[0]  # type: ignore[union-attr]
        scattered = filled.target in (aten.scatter.src, aten.scatter.value)  # type: ignore[union-attr]
        if not scattered or not shape(node) or not is_filled(filled.args[0], -math.inf):  # type: ignore[union-attr]
            return None
        return self._scattered(filled) if dim % len(shape(node)) == len(shape(node)) - 1 else None  # type: ignore[operator, arg-type]

    def _product(self, node: fx.Node) -> ChosenTokens | None:
        """ExpertScores `[t, 1, j]` times what is `[t, j, e]`."""
        first, second = node.args
        found = self(second)  # type: ignore[arg-type]
        if found is None or shape(first)[1] != 1:  # type: ignore[arg-type]
            return None
        kinds = [kind for kind, _ in found.runs]
        left = tuple(run for run in found.runs if run[0] != "j")
        return found.at(left, exact=False) if kinds == ["t", "j", "e"] else None

    def _permuted(self, node: fx.Node) -> ChosenTokens | None:
        source, order = node.args
        found = self(source)  # type: ignore[arg-type]
        dims = None if found is None else _dims_of(found.runs, shape(source))  # type: ignore[arg-type]
        if found is None or dims is None:
            return None
        place = [order.index(dim) for dim in range(len(order))]  # type: ignore[union-attr, arg-type]
        moved = [[place[dim] for dim in group] for group in dims]
        if any(group != list(range(group[0], group[0] + len(group))) for group in moved):
            return None
        pairs = sorted(zip(moved, found.runs, strict=True))
        return found.at(tuple(run for _, run in pairs))

    def _summed(self, node: fx.Node) -> ChosenTokens | None:
        source: Any = node.args[0]
        found, rank = self(source), len(shape(source))
        dims = None if found is None else _dims_of(found.runs, shape(source))
        if found is None or dims is None or not rank:
            return None
        given: Any = node.args[1]
        over = {dim % rank for dim in ([given] if isinstance(given, int) else given)}
        gone = [kind for (kind, _), group in zip(found.runs, dims, strict=True) if over & set(group)]
        once = "j" not in gone or node.target in (aten.any.dim, aten.any.dims, aten.amax.default)
        left = tuple(run for run in found.runs if run[0] not in gone)
        return found.at(left, exact=once or distinct(found.ids)) if set(gone) <= {"j"} else None

    def _column(self, source: fx.Node, dim: int, number: int) -> ChosenTokens | None:
        """What is left of an element of a dim."""
        found = self(source)
        dims = None if found is None else _dims_of(found.runs, shape(source))
        if found is None or dims is None:
            return None
        dim %= len(shape(source))
        if shape(source)[dim] == 1:
            return found
        kind = next((run[0] for run, group in zip(found.runs, dims, strict=True) if dim in group), "")
        if kind == "j" or (kind == "e" and number == self.expert):
            return found.at(tuple(run for run in found.runs if run[0] != kind), exact=kind == "e")
        return None


def _inexact(found: ChosenTokens | None) -> ChosenTokens | None:
    return None if found is None else found.at(found.runs, exact=False)


def _runs(*runs: Run) -> tuple[Run, ...]:
    return tuple(run for run in runs if run[1] != 1)


def _dims_of(runs: Iterable[Run], dims: tuple[int, ...]) -> list[list[int]] | None:
    """The dims of each run, without those of one element; None where a dim crosses from one run to another."""
    left = [dim for dim, size in enumerate(dims) if size != 1]
    found: list[list[int]] = []
    for _, size in runs:
        group: list[int] = []
        while math.prod(dims[dim] for dim in group) < size and left:
            group.append(left.pop(0))
        if math.prod(dims[dim] for dim in group) != size:
            return None
        found.append(group)
    return None if left else found


def _counts(node: fx.Node, count: int) -> bool:
    """Whether a node is 0, 1, ... `count` - 1 along the last dim."""
    while node.target in (aten.view.default, *_COPIES):
        node = operand(node)
    return node.target is aten.arange.default and operand(node) == count and len(node.args) == 1


def distinct(ids: fx.Node) -> bool:
    """Whether the ids of a token, which stand in the last dim, are different ones."""
    while ids.target in (aten.view.default, aten.slice.Tensor, *_COPIES):
        source: Any = ids.args[0]
        if ids.target is aten.view.default and shape(source)[-1:] != shape(ids)[-1:]:
            return False
        ids = source
    if ids.target is not operator.getitem or ids.args[1] != 1:
        return False
    several: Any = ids.args[0]
    rank = len(shape(ids))
    if not rank:
        return False
    if several.target is aten.topk.default:
        return (*several.args, -1)[2 if len(several.args) > 2 else -1] % rank == rank - 1
    return (
        several.target is aten.sort.default
        and (*several.args, -1)[1 if len(several.args) > 1 else -1] % rank == rank - 1
    )


def count_of(ids: fx.Node) -> int:
    """How many experts the ids may name, if what they choose among is known; else 0."""
    while ids.target in (aten.view.default, aten.slice.Tensor, *_COPIES):
        ids = operand(ids)
    if ids.target is aten.argmax.default:
        source, dim = ids.args[0], (*ids.args[1:], None)[0]
    elif ids.target is operator.getitem and ids.args[0].target in _CHOOSE:  # type: ignore[union-attr]
        several: Any = ids.args[0]
        place = 2 if several.target is aten.topk.default else 1
        source, dim = several.args[0], several.args[place] if len(several.args) > place else -1
    else:
        return 0
    return 0 if dim is None else shape(source)[dim]  # type: ignore[arg-type, index]
