"""Operators on matrices. Factorisations split batches and keep each matrix whole. Columns split freely if they are
those of a right-hand side, or if the result is computed column by column."""

from __future__ import annotations

from typing import Any

import torch

from shardc.rules.notation import Rule, parse, rule
from shardc.runtime.kernels import columns

aten = torch.ops.aten


def _words(x: torch.Tensor, *tail: str) -> str:
    """Rule text of a tensor whose last dims are called `tail`.

    The dims before are batch dims. Their names count from the last one, because batch dims broadcast.
    """
    batch = x.dim() - len(tail)
    names = [*(f"b{batch - i}" for i in range(batch)), *tail]
    return " ".join(name if size != 1 else "1" for name, size in zip(names, x.shape, strict=True))


def _plain(x: torch.Tensor, dims: int) -> torch.Tensor:
    """A tensor with the batch dims of the matrices `x` and `dims` more dims, none of size one."""
    return x.new_empty([*x.shape[:-2], *[2] * dims])


@rule(aten.linalg_lu_factor_ex.default)
def lu_factor(x: torch.Tensor, **_: Any) -> Rule:
    matrix, pivots = _words(x, "m!", "n!"), _words(x[..., : min(x.shape[-2:]), 0], "k!")
    return parse(f"{matrix} -> {matrix}, {pivots}, {_words(_plain(x, 0))}")


@rule(aten.lu_unpack.default)
def permutation(x: torch.Tensor, pivots: torch.Tensor, data: bool = True, *_: object) -> Rule:
    """The permutation; a call that wants the triangles is decomposed. Padded pivots would name rows that do not
    exist."""
    rows = x.new_empty([*x.shape[:-1], x.shape[-2]])
    least = min(x.shape[-2:])
    sides = [_words(x[..., :least], "r!", "l!"), _words(x[..., :least, :], "u!", "c!")] if data else ["e!", "f!"]
    operands = f"{_words(x, 'm!', 'n!')}, {_words(pivots, 'k!')}"
    return parse(f"{operands} -> {_words(rows, 'p!', 'q!')}, {', '.join(sides)}", even=True)


@rule(aten._linalg_svd.default)
def singular_values(x: torch.Tensor, full: bool = False, vectors: bool = True, **_: object) -> Rule:
    """Results: left vectors, values, right vectors. Even splits only, because padding may not have a factorisation."""
    *batch, rows, columns_ = x.shape
    least = min(rows, columns_)
    left = x.new_empty([*batch, rows, rows if full else least])
    right = x.new_empty([*batch, columns_ if full else least, columns_])
    sides = (_words(left, "r!", "p!"), _words(right, "q!", "c!")) if vectors else ("e!", "f!")
    values = _words(x[..., :least, 0], "k!")
    return parse(f"{_words(x, 'm!', 'n!')} -> {sides[0]}, {values}, {sides[1]}", even=True)


@rule(aten._linalg_eigh.default)
def eigenvalues(x: torch.Tensor, uplo: str = "L", vectors: bool = True) -> Rule:
    del uplo
    sides = _words(x, "r!", "c!") if vectors else "e!"
    return parse(f"{_words(x, 'm!', 'n!')} -> {_words(x[..., 0], 'k!')}, {sides}", even=True)


@rule(aten.geqrf.default)
def reflections(x: torch.Tensor) -> Rule:
    matrix = _words(x, "m!", "n!")
    return parse(f"{matrix} -> {matrix}, {_words(x[..., : min(x.shape[-2:]), 0], 'k!')}")


@rule(aten.linalg_householder_product.default)
def householder_product(x: torch.Tensor, tau: torch.Tensor) -> Rule:
    text = f"{_words(x, 'm!', 'n!')}, {_words(tau, 'k!')} -> {_words(x, 'r!', 'j~')}"
    return parse(text, body=columns.householder_product)


@rule(aten.ormqr.default)
def reflected(x: torch.Tensor, tau: torch.Tensor, other: torch.Tensor, left: bool = True, *_: object) -> Rule:
    """Reflections from the left act on each column of `other` separately, from the right on each row."""
    result = _words(other, *(("r!", "c") if left else ("r", "c!")))
    return parse(f"{_words(x, 'm!', 'n!')}, {_words(tau, 'k!')}, {result} -> {result}", [{2}])


@rule(aten.cholesky_inverse.default)
def cholesky_inverse(x: torch.Tensor, *_: object) -> Rule:
    return parse(f"{_words(x, 'm!', 'n!')} -> {_words(x, 'r!', 'j~')}", body=columns.cholesky_inverse)


@rule(aten._linalg_solve_ex.default)
def solve(x: torch.Tensor, other: torch.Tensor, *, left: bool = True, **_: object) -> Rule:
    """Results: solution, LU, pivots, info. The last three depend on the matrix alone."""
    vector = other.dim() == 1 or (other.dim() == x.dim() - 1 and other.shape == x.shape[:-1])
    side, solved = ("m!",), ("n!",)
    if not vector:
        side, solved = (("m!", "j"), ("n!", "j")) if left else (("j", "n!"), ("j", "m!"))
    batch = torch.broadcast_shapes(x.shape[:-2], other.shape[: other.dim() - len(side)])
    solution = x.new_empty([*batch, *other.shape[other.dim() - len(side) :]])
    matrix, right = _words(x, "m!", "n!"), _words(other, *side)
    factors = f"{matrix}, {_words(x[..., 0], 'k!')}, {_words(_plain(x, 0))}"
    return parse(f"{matrix}, {right} -> {_words(solution, *solved)}, {factors}", reads=[{0, 1}, {0}, {0}, {0}])


@rule(aten.triangular_solve.default)
def triangular_solve(other: torch.Tensor, x: torch.Tensor, *_: object) -> Rule:
    """Results: the solution and a copy of the matrix, both with the broadcast batch dims."""
    batch = torch.broadcast_shapes(x.shape[:-2], other.shape[:-2])
    solution, copy = x.new_empty([*batch, *other.shape[-2:]]), x.new_empty([*batch, *x.shape[-2:]])
    matrix = ("m!", "n!")
    text = f"{_words(other, 'c!', 'j')}, {_words(x, *matrix)} -> {_words(solution, 'r!', 'j')}, {_words(copy, *matrix)}"
    return parse(text, reads=[{0, 1}, {1}])
