"""Matrices whose columns can be computed one by one, and are split over the mesh.

Each is a solve, or a product of reflections, applied to the rank's columns of the identity. Every rank holds all
operands, so nothing is sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardc.runtime.kernels.parts import Part

__all__ = ["cholesky_inverse", "householder_product"]

aten = torch.ops.aten


def cholesky_inverse(x: Tensor, upper: bool = False, *, j: Part) -> Tensor:
    """`aten.cholesky_inverse`: the rank's columns of the inverse of a matrix whose Cholesky factor is `x`."""
    return aten.cholesky_solve(_identity(x, j), x, upper)


def householder_product(x: Tensor, tau: Tensor, *, j: Part) -> Tensor:
    """`aten.linalg_householder_product`: the rank's columns of the product of the reflections in `x` and `tau`."""
    return aten.ormqr(x[..., : tau.shape[-1]].contiguous(), tau, _identity(x, j), True, False)


def _identity(x: Tensor, j: Part) -> Tensor:
    """The rank's columns of an identity matrix with the rows and the batch of `x`; zeros as padding."""
    rows = torch.arange(x.shape[-2], device=x.device)
    columns = torch.arange(j.start, j.start + j.length, device=x.device)
    identity = (rows[:, None] == columns).to(x.dtype)
    return identity.expand(*x.shape[:-2], *identity.shape).contiguous()
