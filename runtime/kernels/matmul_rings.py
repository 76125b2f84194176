"""Collective matrix products: parts of an operand, or of the sums, go round from rank to rank while ranks multiply.

    ring_lhs    a's part of this step times b, while the part of the next step is on its way
    ring_rhs    the same with b's parts
    ring_sum    every rank adds its product to a sum that comes by, and passes that on to the rank that keeps it

Shapes are those of `aten.mm` and `aten.bmm`: `[m, k]` or `[b, m, k]` times `[k, n]` or `[b, k, n]`. The keyword names
the dim that goes round, with the rank's part of it. Before `outer`, a rank has the dim as `outer` pieces, one after
another, and the part is that of every piece: the rows `(b s)` of a batch of which `s` goes round.

Sources: Wang et al., "Overlap communication with dependent computation via decomposition in large deep learning
models", 2023; the sums of a ring travel as those of a reduce-scatter do, in the dtype of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shardc.runtime.collectives.collective import Started, wait
from shardc.runtime.collectives.permute import permute
from shardc.runtime.kernels.parts import Part
from shardc.runtime.kernels.widening import widened
from shardc.runtime.mesh.mesh import current

__all__ = ["add_ring_lhs", "add_ring_rhs", "add_ring_sum", "ring_lhs", "ring_rhs", "ring_sum"]

M, K_OF_A, K_OF_B, N = -2, -1, -2, -1
"""The dims of the factors, counted from the end."""


def ring_lhs(a: Tensor, b: Tensor, *, m: Part | None = None, k: Part | None = None, outer: int = 1) -> Tensor:
    """`a @ b`, where the rank has its part of the rows of `a`, or of its columns, and all of `b` that these meet."""
    if m is not None:
        return _side_by_side(a, m, M, outer, _shape(a, b), lambda rows: (rows, b))
    assert k is not None
    return _summed(a, k, K_OF_A, outer, lambda columns, at: (columns, _slice(b, K_OF_B, k, at, outer)))


def ring_rhs(a: Tensor, b: Tensor, *, n: Part | None = None, k: Part | None = None, outer: int = 1) -> Tensor:
    """`a @ b`, where the rank has its part of the columns of `b`, or of its rows, and all of `a` that these meet."""
    if n is not None:
        return _side_by_side(b, n, N, outer, _shape(a, b), lambda columns: (a, columns))
    assert k is not None
    return _summed(b, k, K_OF_B, outer, lambda rows, at: (_slice(a, K_OF_A, k, at, outer), rows))


def ring_sum(a: Tensor, b: Tensor, *, m: Part | None = None, n: Part | None = None, outer: int = 1) -> Tensor:
    """The rank's rows `m`, or columns `n`, of the sum over all ranks of `a @ b`."""
    part, dim = (m, M) if m is not None else (n, N)
    assert part is not None
    coming: Started[Tensor] | None = None
    total = a
    for step in range(part.count):
        at = (part.index - 1 - step) % part.count
        one, other = (_slice(a, M, part, at, outer), b) if m is not None else (a, _slice(b, N, part, at, outer))
        product = _full(one @ other, dim, part, outer)
        del one, other  # the next step needs the room
        total = product if coming is None else wait(coming).add_(product)
        del product
        if step + 1 < part.count:
            coming = _passed_on(total, part)
    return total


def add_ring_lhs(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, m: Part | None = None,
    k: Part | None = None, outer: int = 1,
) -> Tensor:  # fmt: skip
    """`beta * bias + alpha * ring_lhs(a, b)`."""
    return _added(bias, ring_lhs(a, b, m=m, k=k, outer=outer), beta, alpha)


def add_ring_rhs(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, n: Part | None = None,
    k: Part | None = None, outer: int = 1,
) -> Tensor:  # fmt: skip
    """`beta * bias + alpha * ring_rhs(a, b)`."""
    return _added(bias, ring_rhs(a, b, n=n, k=k, outer=outer), beta, alpha)


def add_ring_sum(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, m: Part | None = None,
    n: Part | None = None, outer: int = 1,
) -> Tensor:  # fmt: skip
    """`beta * bias + alpha * ring_sum(a, b)`: the bias is added once, to what the rank keeps."""
    return _added(bias, ring_sum(a, b, m=m, n=n, outer=outer), beta, alpha)


def _added(bias: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    if alpha != 1:
        product.mul_(alpha)
    return product.add_(bias, alpha=beta) if beta != 0 else product


def _side_by_side(
    x: Tensor, part: Part, dim: int, outer: int, shape: list[int], factors: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """The result of `shape`, of which each step makes the rows or columns that belong to the part that is there."""
    shape[dim] = outer * part.size
    result = x.new_empty(shape)
    pieces = result.unflatten(dim, (outer, part.size))
    for held, at in _round(x, part):
        start, valid = part.spans[at]
        one, other = factors(_valid(held, dim, part, valid, outer))
        if outer == 1:
            torch.matmul(one, other, out=result.narrow(dim, start, valid))
        else:
            pieces.narrow(dim, start, valid).copy_((one @ other).unflatten(dim, (outer, valid)))
        del held, one, other  # what comes next needs the room
    return result


def _summed(
    x: Tensor, part: Part, dim: int, outer: int, factors: Callable[[Tensor, int], tuple[Tensor, Tensor]]
) -> Tensor:
    """The sum of what the steps make, which is added in 32 bits where the dtype has 16."""
    total: Tensor | None = None
    for held, at in _round(x, part):
        one, other = factors(_valid(held, dim, part, part.spans[at][1], outer), at)
        if total is None:
            total = widened(one @ other)
        elif total.dtype == x.dtype:
            (total.addmm_ if total.dim() == 2 else total.baddbmm_)(one, other)
        else:
            total.add_(one @ other)
        del held, one, other  # what comes next needs the room
    assert total is not None
    return total.to(x.dtype)


def _round(x: Tensor, part: Part) -> Iterator[tuple[Tensor, int]]:
    """Every part of `x` with its number, the rank's own first; the next one comes while a part is used. Parts may be
    empty."""
    for step in range(part.count):
        coming = _passed_on(x, part) if step + 1 < part.count else None
        yield x, (part.index - step) % part.count
        if coming is not None:
            x = wait(coming)


def _passed_on(x: Tensor, part: Part) -> Started[Tensor]:
    """Start to send `x` to the next rank, and to receive that of the one before. What is transposed travels as it lies
    in memory."""
    (axis,) = part.axes
    count, turned = current().size(axis), not x.is_contiguous() and x.mT.is_contiguous()
    sources = [(place - 1) % count for place in range(count)]
    started = permute.start(x.mT if turned else x, axis=axis, sources=sources)
    return Started(lambda: started.land().mT) if turned else started


def _shape(a: Tensor, b: Tensor) -> list[int]:
    return [*a.shape[:-1], b.shape[-1]]


def _slice(x: Tensor, dim: int, part: Part, at: int, outer: int) -> Tensor:
    """What belongs to the part numbered `at`, without padding, of a dim that a rank has all of."""
    start, valid = part.spans[at]
    if outer == 1:
        return x.narrow(dim, start, valid)
    dim += x.dim()
    return x.unflatten(dim, (outer, part.size)).narrow(dim + 1, start, valid).flatten(dim, dim + 1)


def _valid(x: Tensor, dim: int, part: Part, valid: int, outer: int) -> Tensor:
    """A part without its padding."""
    if valid == part.length:
        return x
    dim += x.dim()
    return x.unflatten(dim, (outer, part.length)).narrow(dim + 1, 0, valid).flatten(dim, dim + 1)


def _full(x: Tensor, dim: int, part: Part, outer: int) -> Tensor:
    """A part with zeros as its padding."""
    valid = x.shape[dim] // outer
    if valid == part.length:
        return x
    dim += x.dim()
    shape = [*x.shape[:dim], outer, part.length, *x.shape[dim + 1 :]]
    padded = x.new_zeros(shape)
    padded.narrow(dim + 1, 0, valid).copy_(x.unflatten(dim, (outer, valid)))
    return padded.flatten(dim, dim + 1)
