"""Operators as a factorisation and cheaper operators on its factors: determinants, inverses, LU, QR, pseudoinverses.

The factorisation keeps matrices whole; the operators on its factors may be split.

torch's kernels of determinants factorise the matrix or its transpose, whichever is column-major, and their backward
uses the same choice. Here the choice is made when the program is planned, from the strides of eager mode.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from shardc.ir.program import value_of
from shardc.rules.rewrites.builder import Builder

aten = torch.ops.aten


def determinant(b: Builder, x: fx.Node) -> tuple[fx.Node, ...]:
    """Results: determinant, LU and pivots."""
    factors, pivots, diagonal, parity = _factorised(b, x)
    return b(aten.mul.Tensor, b(aten.prod.dim_int, diagonal, -1, False), parity), factors, pivots


def sign_and_logarithm(b: Builder, x: fx.Node) -> tuple[fx.Node, ...]:
    """Results: sign of the determinant, logarithm of its size, LU and pivots."""
    factors, pivots, diagonal, parity = _factorised(b, x)
    sign = b(aten.mul.Tensor, b(aten.prod.dim_int, b(aten.sgn.default, diagonal), -1, False), parity)
    size = b(aten.sum.dim_IntList, b(aten.log.default, b(aten.abs.default, diagonal)), [-1], False)
    return sign, size, factors, pivots


def _factorised(b: Builder, x: fx.Node) -> tuple[fx.Node, ...]:
    """LU, pivots, the diagonal of U, and the sign of the row exchanges: 1 or -1."""
    value = value_of(x)
    rank, size = value.dim(), int(value.shape[-1])
    if value.is_contiguous() and not value.is_complex():
        x = b(aten.permute.default, x, [*range(rank - 2), rank - 1, rank - 2])
    results = b(aten.linalg_lu_factor_ex.default, x)
    factors, pivots = b(operator.getitem, results, 0), b(operator.getitem, results, 1)
    diagonal = b(aten.diagonal.default, factors, 0, -2, -1)
    places = b(aten.add.Tensor, b.arange(x, size), 1)
    moved = b(aten._to_copy.default, b(aten.ne.Tensor, pivots, places), dtype=torch.int64)
    odd = b(aten.remainder.Scalar, b(aten.sum.dim_IntList, moved, [-1], False), 2)
    parity = b(aten.rsub.Scalar, b(aten.mul.Tensor, odd, 2), 1)
    return factors, pivots, diagonal, b.cast(parity, value.dtype)


def inverse(b: Builder, x: fx.Node, *, check_errors: bool = False) -> tuple[fx.Node, fx.Node]:
    """The solution for the columns of the identity, as in ATen. Results: the inverse, and info (0 if it exists)."""
    value = value_of(x)
    size = int(value.shape[-1])
    places = b.arange(x, size)
    ones = b.cast(b(aten.eq.Tensor, b.view(places, [size, 1]), places), value.dtype)
    batch = [int(n) for n in value.shape]
    results = b(aten._linalg_solve_ex.default, x, b(aten.expand.default, ones, batch), check_errors=check_errors)
    return b.item(results, 0), b.item(results, 3)


def lu(b: Builder, x: fx.Node, *, pivot: bool = True) -> tuple[fx.Node, ...]:
    """Results: permutation, lower triangle, upper triangle."""
    results = b(aten.linalg_lu_factor_ex.default, x, pivot=pivot)
    return _unpacked(b, b(operator.getitem, results, 0), b(operator.getitem, results, 1), pivot)


def lu_unpack(
    b: Builder, factors: fx.Node, pivots: fx.Node, data: bool = True, permutation: bool = True
) -> tuple[fx.Node, ...] | None:
    return _unpacked(b, factors, pivots, permutation) if data else None


def _unpacked(b: Builder, factors: fx.Node, pivots: fx.Node, permutation: bool) -> tuple[fx.Node, ...]:
    value = value_of(factors)
    rank, (rows, columns) = value.dim(), (int(n) for n in value.shape[-2:])
    least = min(rows, columns)
    left = b(aten.slice.Tensor, factors, rank - 1, 0, least)
    row, column = b.view(b.arange(factors, rows), [rows, 1]), b.arange(factors, least)
    ones = b.cast(b(aten.eq.Tensor, row, column), value.dtype)
    lower = b(aten.add.Tensor, b(aten.tril.default, left, -1), ones)
    upper = b(aten.triu.default, b(aten.slice.Tensor, factors, rank - 2, 0, least))
    order = b(aten.lu_unpack.default, factors, pivots, False, True) if permutation else None
    return b.zeros(factors, [0]) if order is None else b.item(order, 0), lower, upper


def qr(b: Builder, x: fx.Node, mode: str = "reduced") -> tuple[fx.Node, fx.Node] | None:
    """Results: the product of Householder reflections, whose columns split freely, and the upper triangle."""
    value = value_of(x)
    rank, (rows, columns) = value.dim(), (int(n) for n in value.shape[-2:])
    if value.numel() == 0:
        return None
    results = b(aten.geqrf.default, x)
    packed, scales = b.item(results, 0), b.item(results, 1)
    wide = rows if mode == "complete" else min(rows, columns)
    triangle = b(aten.triu.default, b(aten.slice.Tensor, packed, rank - 2, 0, wide))
    if mode == "r":
        return b.zeros(x, [0]), triangle
    vectors = b(aten.slice.Tensor, packed, rank - 1, 0, min(wide, columns))
    if wide > columns:
        vectors = b(aten.constant_pad_nd.default, vectors, [0, wide - columns])
    return b(aten.linalg_householder_product.default, vectors, scales), triangle


def pinv(
    b: Builder, x: fx.Node, *, atol: fx.Node | None = None, rtol: fx.Node | None = None, hermitian: bool = False
) -> fx.Node | None:
    """The product of scaled singular vectors (eigenvectors if `hermitian`), as in ATen."""
    value = value_of(x)
    if value.is_complex() or value.numel() == 0:
        return None
    rank = value.dim()
    atol, rtol = _tolerances(b, x, atol, rtol)
    if hermitian:
        results = b(aten._linalg_eigh.default, x)
        values, left = b.item(results, 0), b.item(results, 1)
        sizes, right = b(aten.abs.default, values), left
        largest = b(aten.amax.default, sizes, [-1], True)
    else:
        results = b(aten._linalg_svd.default, x)
        left, values = b.item(results, 0), b.item(results, 1)
        sizes, right = values, b(aten.permute.default, b.item(results, 2), _turned(rank))
        largest = b(aten.slice.Tensor, values, rank - 2, 0, 1)
    least = b(aten.mul.Tensor, b(aten.unsqueeze.default, rtol, value_of(rtol).dim()), largest)
    least = b(aten.maximum.default, b(aten.unsqueeze.default, atol, value_of(atol).dim()), least)
    large = b(aten.gt.Tensor, sizes, least)
    inverse = b(aten.where.self, large, b(aten.reciprocal.default, values), b.zeros(values, []))
    scaled = b(aten.mul.Tensor, right, b(aten.unsqueeze.default, b.cast(inverse, value.dtype), rank - 2))
    return _product(b, scaled, b(aten.permute.default, left, _turned(rank)))


def _tolerances(b: Builder, x: fx.Node, atol: fx.Node | None, rtol: fx.Node | None) -> tuple[fx.Node, fx.Node]:
    """The absolute and the relative tolerance, with torch's defaults."""
    value = value_of(x)
    if rtol is None:
        rtol = b.full(x, [], torch.finfo(value.dtype).eps * max(value.shape[-2:]), torch.float64)
        if atol is not None:
            none = b.full(x, [], 0, torch.float64)
            rtol = b(aten.where.self, b(aten.gt.Scalar, atol, 0), none, rtol)
    return b.full(x, [], 0, torch.float64) if atol is None else atol, rtol


def _turned(rank: int) -> list[int]:
    """The dims of a batch of matrices, with the last two exchanged."""
    return [*range(rank - 2), rank - 1, rank - 2]


def _product(b: Builder, left: fx.Node, right: fx.Node) -> fx.Node:
    """The product of two matrices, or of two batches with the same batch dims."""
    *batch, rows, inner = (int(n) for n in value_of(left).shape)
    columns = int(value_of(right).shape[-1])
    if not batch:
        return b(aten.mm.default, left, right)
    flat = b(aten.bmm.default, b.view(left, [-1, rows, inner]), b.view(right, [-1, inner, columns]))
    return b.view(flat, [*batch, rows, columns])


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    aten.linalg_inv_ex.default: inverse,
    aten.linalg_lu.default: lu,
    aten.lu_unpack.default: lu_unpack,
    aten.linalg_qr.default: qr,
    aten.linalg_pinv.atol_rtol_tensor: pinv,
    aten._linalg_det.default: determinant,
    aten._linalg_slogdet.default: sign_and_logarithm,
}
