"""Running sums, products and extremes along a dim that the mesh splits: the ranks all-gather each part's last value.

Padding stands at the end of a part, after all elements that count, so it need not be filled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shardc.runtime.kernels.parts import Part
from shardc.runtime.kernels.widening import LOW, widened

__all__ = ["cummax", "cummin", "cumprod", "cumsum", "logcumsumexp"]


def cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None, s: Part) -> Tensor:
    """`aten.cumsum` along `dim`, of which this rank holds part `s`."""
    local = _scanned(x, dim, dtype, torch.cumsum)
    return (local + _before(local, dim, s).sum(dim % x.dim(), keepdim=True)).to(_result_dtype(x, dtype))


def cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None, s: Part) -> Tensor:
    """`aten.cumprod` along `dim`, of which this rank holds part `s`."""
    local = _scanned(x, dim, dtype, torch.cumprod)
    return (local * _before(local, dim, s).prod(dim % x.dim(), keepdim=True)).to(_result_dtype(x, dtype))


def logcumsumexp(x: Tensor, dim: int, *, s: Part) -> Tensor:
    """`aten.logcumsumexp` along `dim`, of which this rank holds part `s`."""
    local = torch.logcumsumexp(widened(x), dim)
    before = _before(local, dim, s)
    return torch.logaddexp(local, torch.logsumexp(before, dim, keepdim=True)).to(x.dtype)


def cummax(x: Tensor, dim: int, *, s: Part) -> tuple[Tensor, Tensor]:
    """`aten.cummax` along `dim`, of which this rank holds part `s`."""
    return _running(torch.cummax, torch.ge, x, dim, s)


def cummin(x: Tensor, dim: int, *, s: Part) -> tuple[Tensor, Tensor]:
    """`aten.cummin` along `dim`, of which this rank holds part `s`."""
    return _running(torch.cummin, torch.le, x, dim, s)


def _running(
    scan: Callable[[Tensor, int], tuple[Tensor, Tensor]], keeps: Callable[[Tensor, Tensor], Tensor], x: Tensor,
    dim: int, s: Part,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Values and positions as on a single device: a later element replaces an equal one, and nothing replaces a NaN."""
    local, places = scan(x, dim)
    places = places + s.start
    best, at = _before(local, dim, s), _before(places, dim, s)
    if best.shape[dim] == 0:
        return local, places
    best, number = scan(best, dim)
    best, number = best.narrow(dim, -1, 1), number.narrow(dim, -1, 1)
    kept = keeps(local, best) | local.isnan()
    return torch.where(kept, local, best), torch.where(kept, places, at.gather(dim, number))


def _before(local: Tensor, dim: int, s: Part) -> Tensor:
    """The last values of the parts before this one, side by side along `dim`.

    Parts that are all padding are left out. Over two axes, they may stand between others.
    """
    last = local.narrow(dim, max(s.valid, 1) - 1, 1)
    real = [number for number, (_, valid) in enumerate(s.spans[: s.index]) if valid]
    return s.gather(last, dim % local.dim()).index_select(
        dim, torch.tensor(real, dtype=torch.int64, device=local.device)
    )


def _scanned(x: Tensor, dim: int, dtype: torch.dtype | None, scan: Callable[..., Tensor]) -> Tensor:
    """The scan of the rank's part, in a dtype wide enough to add to other parts without loss."""
    result = _result_dtype(x, dtype)
    return scan(x, dim, dtype=torch.float32 if result in LOW else result)


def _result_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    floating = x.is_floating_point() or x.is_complex()
    return dtype or (x.dtype if floating else torch.int64)
