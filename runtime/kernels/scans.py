"""Running sums, products and extremes along a dim that the mesh splits: each part's last value travels to all parts.

Padding at the end of a part comes after all that counts, so nothing need be filled.
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
    own = _scanned(x, dim, dtype, torch.cumsum)
    return (own + _before(own, dim, s).sum(dim % x.dim(), keepdim=True)).to(_result_dtype(x, dtype))


def cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None, s: Part) -> Tensor:
    """`aten.cumprod` along `dim`, of which this rank holds part `s`."""
    own = _scanned(x, dim, dtype, torch.cumprod)
    return (own * _before(own, dim, s).prod(dim % x.dim(), keepdim=True)).to(_result_dtype(x, dtype))


def logcumsumexp(x: Tensor, dim: int, *, s: Part) -> Tensor:
    """`aten.logcumsumexp` along `dim`, of which this rank holds part `s`."""
    own = torch.logcumsumexp(widened(x), dim)
    before = _before(own, dim, s)
    return torch.logaddexp(own, torch.logsumexp(before, dim, keepdim=True)).to(x.dtype)


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
    """As within one part: a later element replaces an earlier one that is no better, and nothing replaces a nan."""
    own, places = scan(x, dim)
    places = places + s.start
    best, at = _before(own, dim, s), _before(places, dim, s)
    if best.shape[dim] == 0:
        return own, places
    best, found = scan(best, dim)
    best, found = best.narrow(dim, -1, 1), found.narrow(dim, -1, 1)
    kept = keeps(own, best) | own.isnan()
    return torch.where(kept, own, best), torch.where(kept, places, at.gather(dim, found))


def _before(own: Tensor, dim: int, s: Part) -> Tensor:
    """The last values of the parts before this one, side by side along `dim`, but for those that are all padding (over
    two axes, these need not be the last)."""
    last = own.narrow(dim, max(s.valid, 1) - 1, 1)
    real = [number for number, (_, valid) in enumerate(s.spans[: s.index]) if valid]
    return s.gather(last, dim % own.dim()).index_select(dim, torch.tensor(real, dtype=torch.int64, device=own.device))


def _scanned(x: Tensor, dim: int, dtype: torch.dtype | None, scan: Callable[..., Tensor]) -> Tensor:
    """The scan of the own part, in the type in which sums of parts lose nothing."""
    result = _result_dtype(x, dtype)
    return scan(x, dim, dtype=torch.float32 if result in LOW else result)


def _result_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    floating = x.is_floating_point() or x.is_complex()
    return dtype or (x.dtype if floating else torch.int64)
