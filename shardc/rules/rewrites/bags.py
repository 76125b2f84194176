"""Embedding bags as a lookup and a sum over every bag, so that rows, words and features may all be split.

A bag is a range of the flat indices, from its offset to the next. If the offsets have even steps, as those of a matrix
of bags, the indices are viewed as a matrix. Else the bag of every index is computed from its position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from shardc.ir.program import value_of
from shardc.rules.notation import Rule, letters, mark, parse, rule
from shardc.rules.rewrites.builder import Builder

aten = torch.ops.aten
SUM, MEAN, MAX = 0, 1, 2
"""The modes, as torch numbers them."""


class _Bags:
    """`count` bags over flat `indices`. `words` is the length of a bag if all have the same, else None."""

    def __init__(self, b: Builder, indices: fx.Node, offsets: fx.Node, count: int, padding: int) -> None:
        self.b, self.indices, self.count = b, indices, count
        self.total = int(value_of(indices).shape[0])
        even = offsets.target is aten.arange.start_step and offsets.args[0] == 0 and self.total
        step = int(offsets.args[2]) if even else 0  # type: ignore[arg-type]
        self.words = step if step and step * count == self.total else None
        self._real = b(aten.ne.Scalar, indices, padding) if padding >= 0 else None
        self._bag: fx.Node | None = None
        if self.words is None:
            places = self._column(b.arange(indices, self.total))
            starts = b(aten.slice.Tensor, offsets, 0, 0, count)
            begun = b(aten._to_copy.default, b(aten.ge.Tensor, places, starts), dtype=torch.int64)
            self._bag = b(aten.sub.Tensor, b(aten.sum.dim_IntList, begun, [1], False), 1)

    def _column(self, x: fx.Node) -> fx.Node:
        return self.b(aten.unsqueeze.default, x, 1)

    def real(self, rows: fx.Node, weights: fx.Node | None = None) -> fx.Node:
        """`rows`, one for each index, with zeros for padding, multiplied by the weights."""
        if self._real is not None:
            mask = self.b(aten._to_copy.default, self._real, dtype=value_of(rows).dtype)
            rows = self.b(aten.mul.Tensor, rows, self._column(mask))
        return rows if weights is None else self.b(aten.mul.Tensor, rows, self._column(weights))

    def gathered(self, rows: fx.Node) -> fx.Node:
        """The sum of every bag's rows."""
        b, width = self.b, int(value_of(rows).shape[1])
        if self.words is not None:
            return b(aten.sum.dim_IntList, b(aten.view.default, rows, [self.count, self.words, width]), [1], False)
        return b(aten.index_add.default, b.zeros(rows, [self.count, width]), 0, self._bag, rows)

    def spread(self, bags: fx.Node) -> fx.Node:
        """For every index, the row of its bag."""
        b, width = self.b, int(value_of(bags).shape[1])
        if self.words is None:
            return b(aten.index_select.default, bags, 0, self._bag)
        wide = b(aten.expand.default, b(aten.unsqueeze.default, bags, 1), [self.count, self.words, width])
        return b(aten.view.default, b(aten.clone.default, wide), [self.total, width])

    def sizes(self, like: fx.Node) -> fx.Node:
        """The number of indices in every bag without padding, as a column of the dtype of `like`."""
        return self.gathered(self.real(self.b.full(like, [self.total, 1], 1)))

    def matrix(self) -> tuple[fx.Node, fx.Node]:
        """Candidate indices of every bag (or the same for all bags), and a mask of those in the bag."""
        b = self.b
        if self.words is not None:
            shape = [self.count, self.words]
            mask = b.full(self.indices, shape, True, torch.bool)
            if self._real is not None:
                mask = b(aten.view.default, self._real, shape)
            return b(aten.view.default, self.indices, shape), mask
        mask = b(aten.eq.Tensor, self._column(b.arange(self.indices, self.count)), self._bag)
        if self._real is not None:
            mask = b(aten.logical_and.default, mask, self._real)
        return b(aten.unsqueeze.default, self.indices, 0), mask


def embedding_bag(
    b: Builder, table: fx.Node, indices: fx.Node, offsets: fx.Node, by_frequency: bool = False, mode: int = SUM,
    sparse: bool = False, weights: fx.Node | None = None, last_offset: bool = False, padding: int = -1,
) -> tuple[fx.Node, ...] | None:  # fmt: skip
    """The results for backward are zeros, except the last in mode MAX: the index of the maximum per bag and feature."""
    if by_frequency or sparse:
        return None
    bags = _Bags(b, indices, offsets, int(value_of(offsets).shape[0]) - last_offset, padding)
    unread = [b.full(indices, [int(n) for n in like.shape], 0) for like in b.result[1:]]
    if mode == MAX:
        output, won = _extremes(b, table, bags)
        return output, *unread[:2], won
    output = bags.gathered(bags.real(b(aten.embedding.default, table, indices), weights))
    if mode == MEAN:
        output = b(aten.div.Tensor, output, b(aten.clamp_min.default, bags.sizes(table), 1))
    return output, *unread


def _extremes(b: Builder, table: fx.Node, bags: _Bags) -> tuple[fx.Node, fx.Node]:
    candidates, mask = bags.matrix()
    outside = b.full(table, [], float("-inf"))
    rows = b(aten.where.self, b(aten.unsqueeze.default, mask, 2), b(aten.embedding.default, table, candidates), outside)
    best, place = b(aten.amax.default, rows, [1]), b(aten.argmax.default, rows, 1)
    filled = b(aten.gt.Scalar, bags.sizes(table), 0)
    wide = b(aten.expand.default, candidates, [int(n) for n in value_of(mask).shape])
    return b(aten.where.self, filled, best, b.zeros(table, [])), b(aten.gather.default, wide, 1, place)


def embedding_bag_backward(
    b: Builder, grad: fx.Node, indices: fx.Node, offsets: fx.Node, bag_of: fx.Node, sizes: fx.Node, won: fx.Node,
    rows: int, by_frequency: bool, mode: int, sparse: bool, weights: fx.Node | None, padding: int = -1,
) -> fx.Node | None:  # fmt: skip
    del bag_of, sizes
    if by_frequency or sparse:
        return None
    bags = _Bags(b, indices, offsets, int(value_of(grad).shape[0]), padding)
    if mode == MAX:
        filled = b(aten._to_copy.default, b(aten.gt.Scalar, bags.sizes(grad), 0), dtype=value_of(grad).dtype)
        empty = b.zeros(grad, [rows, int(value_of(grad).shape[1])])
        return b(aten.scatter_add.default, empty, 0, won, b(aten.mul.Tensor, grad, filled))
    if mode == MEAN:
        grad = b(aten.div.Tensor, grad, b(aten.clamp_min.default, bags.sizes(grad), 1))
    return b(aten.embedding_dense_backward.default, bags.real(bags.spread(grad), weights), indices, rows, -1, False)


def weights_backward(
    b: Builder, grad: fx.Node, table: fx.Node, indices: fx.Node, offsets: fx.Node, bag_of: fx.Node, mode: int,
    padding: int = -1,
) -> fx.Node:  # fmt: skip
    """The gradient of the weight of every index. Only mode SUM has weights."""
    del bag_of, mode
    bags = _Bags(b, indices, offsets, int(value_of(grad).shape[0]), padding)
    products = b(aten.mul.Tensor, bags.spread(grad), b(aten.embedding.default, table, indices))
    return b(aten.sum.dim_IntList, bags.real(products), [1], False)


@rule(aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def whole(table: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, *rest: Any) -> Rule:
    """The rule of calls that are not decomposed, because their gradient needs the counts of rows: all dims stay
    whole."""
    every = (table, indices, offsets, *rest)
    operands = [_whole(x, f"o{i}d") for i, x in enumerate(every) if isinstance(x, torch.Tensor)]
    return parse(f"{', '.join(operands)} -> b! f!, i!, c!, {'w! x!' if MAX in rest[1:2] else 'w!'}")


@rule(aten._embedding_bag_backward.default)
def whole_backward(*arguments: Any) -> Rule:
    operands = [_whole(x, f"o{i}d") for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]
    return parse(f"{', '.join(operands)} -> v! f!", [{0}])


def _whole(x: torch.Tensor, prefix: str) -> str:
    return mark(letters(x, prefix), range(x.dim()))


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    aten._embedding_bag.default: embedding_bag,
    aten._embedding_bag_forward_only.default: embedding_bag,
    aten._embedding_bag_backward.default: embedding_bag_backward,
    aten._embedding_bag_per_sample_weights_backward.default: weights_backward,
}
