"""Determinants, by a factorisation and elementwise operators on its diagonal.

torch's own kernels factorise the matrix or its transpose, whichever lies plainly in memory, and the backward goes by
how the matrix lay on the single device. Here the choice is made once, when the program is planned.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from shardc.graph import value_of
from shardc.rules.builder import Builder
from shardc.rules.notation import Rule, letters, parse, rule

aten = torch.ops.aten


@rule(aten.linalg_lu_factor_ex.default)
def lu_factor(x: torch.Tensor, **_: Any) -> Rule:
    """Matrices stay whole, batches of them split."""
    *batch, rows, columns = x.shape
    names = letters(x)[: len(batch)]

    def text(*more: tuple[str, int]) -> str:
        return " ".join([*names, *(f"{name}!" if size != 1 else "1" for name, size in more)])

    matrix, pivots = text(("m", rows), ("n", columns)), text(("k", min(rows, columns)))
    return parse(f"{matrix} -> {matrix}, {pivots}, {text()}")


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
    """LU, pivots, the diagonal of U, and what the row exchanges do to the sign: 1 or -1."""
    value = value_of(x)
    rank, size = value.dim(), int(value.shape[-1])
    if value.is_contiguous() and not value.is_complex():
        x = b(aten.permute.default, x, [*range(rank - 2), rank - 1, rank - 2])
    made = b(aten.linalg_lu_factor_ex.default, x)
    factors, pivots = b(operator.getitem, made, 0), b(operator.getitem, made, 1)
    diagonal = b(aten.diagonal.default, factors, 0, -2, -1)
    places = b(aten.add.Tensor, b.arange(x, size), 1)
    moved = b(aten._to_copy.default, b(aten.ne.Tensor, pivots, places), dtype=torch.int64)
    odd = b(aten.remainder.Scalar, b(aten.sum.dim_IntList, moved, [-1], False), 2)
    parity = b(aten.rsub.Scalar, b(aten.mul.Tensor, odd, 2), 1)
    return factors, pivots, diagonal, b.cast(parity, value.dtype)


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    aten._linalg_det.default: determinant,
    aten._linalg_slogdet.default: sign_and_logarithm,
}
