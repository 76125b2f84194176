"""Patches for a trace: functions of torch that branch on values, written so that they do not.

torch.cov(x, fweights=w)    # torch checks the values of w first, here the program checks them when it runs
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardc.capture.torch_patches.autocast import off, widened
from shardc.runtime.kernels.checks import checked, confirmed


def _gaussian_nll_loss(
    x: Tensor, target: Tensor, var: Tensor | float, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """As torch computes it, but the program checks `var` when it runs."""
    if not isinstance(var, Tensor):
        if var < 0:
            raise ValueError("var has negative entry/entries")
        var = x.new_full([], var).expand(x.shape)
    if var.shape == x.shape[:-1]:
        var = var.unsqueeze(-1)
    elif var.shape not in (x.shape, (*x.shape[:-1], 1)):
        raise ValueError("var is of incorrect size")
    bounded: Tensor = confirmed(var, ~(var < 0).any(), "var has negative entry/entries").clone()
    with torch.no_grad():  # torch takes no gradient of the bound
        bounded.clamp_(min=eps)
    loss = 0.5 * (bounded.log() + (x - target) ** 2 / bounded)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    match reduction:
        case "none":
            return loss
        case "mean":
            return loss.mean()
        case "sum":
            return loss.sum()
        case _:
            raise ValueError(f"{reduction} is not valid")


def _combinations(x: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
    """Which elements are combined depends on their number alone, so the indices are constants."""
    choose = itertools.combinations_with_replacement if with_replacement else itertools.combinations
    if x.dim() != 1 or r < 1:
        return torch.combinations(x, r, with_replacement)
    chosen = list(choose(range(x.shape[0]), r))
    return x[torch.tensor(chosen, dtype=torch.int64, device=x.device).reshape(-1, r)]


def _lstsq(a: Tensor, b: Tensor, rcond: float | None = None, *, driver: str | None = None) -> Any:
    """With driver "gels", which requires full rank, by QR as torch computes it. The other drivers measure the rank."""
    vector = b.dim() == 1 or (b.dim() == a.dim() - 1 and b.shape == a.shape[:-1])
    if driver != "gels" or a.numel() == 0 or vector:
        return torch.linalg.lstsq(a, b, rcond, driver=driver)
    a, b = widened(a), widened(b)
    with off():
        return _of_full_rank(a, b)


def _of_full_rank(a: Tensor, b: Tensor) -> Any:
    rows, columns = a.shape[-2:]
    q, r = torch.linalg.qr(a if rows >= columns else a.mH)
    deficient = (r.diagonal(dim1=-2, dim2=-1) == 0).sum(-1).to(torch.int32)
    if rows >= columns:
        x = torch.linalg.solve_triangular(r, q.mH @ b, upper=True)
    else:
        x = q @ torch.linalg.solve_triangular(r.mH, b, upper=False)
    x = checked(x, deficient, "torch.linalg.lstsq", a.dim() == 2)
    residuals = (b - a @ x).abs().square().sum(-2) if rows > columns else a.new_empty(0)
    return_types: Any = torch.return_types
    return return_types.linalg_lstsq((x, residuals, a.new_empty(0, dtype=torch.int64), a.new_empty(0)))


def _cov(x: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None) -> Tensor:
    """As torch computes it, but the program checks the weights when it runs."""
    x = x.reshape(1, -1) if x.dim() < 2 else x
    if not (x.is_floating_point() or x.is_complex()) or x.numel() == 0:
        return torch.cov(x, correction=correction, fweights=fweights, aweights=aweights)
    weights = _weights(fweights, aweights)
    if weights is None:
        total, weighted, norm = x.shape[1], x, max(x.shape[1] - correction, 0)
    else:
        total, weighted = weights.sum(), x * weights
        spread = correction * (weights * aweights).sum() / total if aweights is not None and correction else correction
        norm = (total - spread).clamp(min=0)
    mean = weighted.sum(1, keepdim=True) / total
    offset = x - mean
    product = offset @ (offset if weights is None else offset * weights).mH
    return (product / norm).squeeze()


def _weights(fweights: Tensor | None, aweights: Tensor | None) -> Tensor | None:
    """The product of the weights that are there, or None. The program checks that none is negative, nor all are
    zero."""
    product = None
    for weights in (fweights, aweights):
        if weights is not None:
            weights = confirmed(weights, (weights >= 0).all(), "cov: weights cannot be negative")
            product = weights if product is None else product * weights
    return product if product is None else confirmed(product, product.sum() != 0, "cov: weights sum to zero")


def _corrcoef(x: Tensor) -> Tensor:
    c = _cov(x)
    if c.dim() == 0:
        return c / c
    deviation = c.diagonal().real.sqrt() if c.is_complex() else c.diagonal().sqrt()
    c = c / deviation[:, None] / deviation
    return torch.complex(c.real.clamp(-1, 1), c.imag.clamp(-1, 1)) if c.is_complex() else c.clamp(-1, 1)


PATCHES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.gaussian_nll_loss: _gaussian_nll_loss,
    torch.combinations: _combinations,
    torch.linalg.lstsq: _lstsq,
    torch.cov: _cov,
    torch.Tensor.cov: _cov,
    torch.corrcoef: _corrcoef,
    torch.Tensor.corrcoef: _corrcoef,
}
"""Functions of torch, and what `Provenance` calls in their place."""
