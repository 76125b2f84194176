"""Largest and smallest elements, and their positions, along dims that the mesh splits: each part sends its candidates.

Candidates are gathered, not reduced, so that ties and NaN have the same result as on a single device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shardc.runtime.kernels.parts import Part, by_dim

__all__ = ["argmax", "argmin", "max_along", "min_along", "topk"]

_Find = Callable[..., tuple[Tensor, Tensor]]


def max_along(x: Tensor, dim: int, keepdim: bool = False, *, s: Part) -> tuple[Tensor, Tensor]:
    """`aten.max.dim`: values and positions along `dim`, of which this rank holds part `s`."""
    return _extreme(torch.max, x, dim, keepdim, s)


def min_along(x: Tensor, dim: int, keepdim: bool = False, *, s: Part) -> tuple[Tensor, Tensor]:
    """`aten.min.dim`: values and positions along `dim`, of which this rank holds part `s`."""
    return _extreme(torch.min, x, dim, keepdim, s)


def argmax(x: Tensor, dim: int | None = None, keepdim: bool = False, **parts: Part) -> Tensor:
    """`aten.argmax` along `dim`, or of all elements; this rank holds the given parts of the dims."""
    return _place(torch.max, x, dim, keepdim, parts)


def argmin(x: Tensor, dim: int | None = None, keepdim: bool = False, **parts: Part) -> Tensor:
    """`aten.argmin` along `dim`, or of all elements; this rank holds the given parts of the dims."""
    return _place(torch.min, x, dim, keepdim, parts)


def _extreme(find: _Find, x: Tensor, dim: int, keepdim: bool, s: Part) -> tuple[Tensor, Tensor]:
    dim %= x.dim()
    values, places = find(s.fill(x, dim, _worst(x.dtype, find is torch.max)), dim, keepdim=True)
    values, places = s.gather(values, dim), s.gather(places + s.start, dim)
    value, at = find(values, dim, keepdim=True)
    place = places.gather(dim, at)
    return (value, place) if keepdim else (value.squeeze(dim), place.squeeze(dim))


def _place(find: _Find, x: Tensor, dim: int | None, keepdim: bool, parts: dict[str, Part]) -> Tensor:
    if dim is not None:
        (s,) = parts.values()
        return _extreme(find, x, dim, keepdim, s)[1]
    parts_by_dim = by_dim(parts)
    for at, part in parts_by_dim.items():
        x = part.fill(x, at, _worst(x.dtype, find is torch.max))
    value, place = find(x.flatten(), 0, keepdim=True)
    inner = torch.unravel_index(place, x.shape)
    place = torch.zeros_like(place)
    for at, local in enumerate(inner):  # the number of the element in the global tensor
        size, start = (parts_by_dim[at].size, parts_by_dim[at].start) if at in parts_by_dim else (x.shape[at], 0)
        place = place * size + local + start
    for part in parts.values():
        values, places = part.gather(value, 0), part.gather(place, 0)
        order = places.argsort()  # of equal values the first counts, whichever part has it
        value, best = find(values[order], 0, keepdim=True)
        place = places[order][best]
    return place.view([1] * x.dim()) if keepdim else place.view([])


def topk(
    x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, *, s: Part
) -> tuple[Tensor, Tensor]:
    """`aten.topk` along `dim`, of which this rank holds part `s`: every part sends its `k` best."""
    dim %= x.dim()
    values, places = torch.topk(x.narrow(dim, 0, s.valid), min(k, s.valid), dim, largest)
    values, places = (_gathered(_lengthened(t, dim, k), dim, k, s) for t in (values, places + s.start))
    value, at = torch.topk(values, k, dim, largest, sorted)
    return value, places.gather(dim, at)


def _lengthened(x: Tensor, dim: int, size: int) -> Tensor:
    missing = list(x.shape)
    missing[dim] = size - x.shape[dim]
    return torch.cat([x, x.new_zeros(missing)], dim)


def _gathered(x: Tensor, dim: int, k: int, s: Part) -> Tensor:
    """The candidates of all parts, without the filling of parts shorter than `k`."""
    pieces = s.gather(x, dim).split(k, dim)
    real = [piece.narrow(dim, 0, min(k, valid)) for piece, (_, valid) in zip(pieces, s.spans, strict=True)]
    return torch.cat(real, dim)


def _worst(dtype: torch.dtype, largest: bool) -> float:
    """The value that is never larger (smaller) than another, so that padding with it never wins."""
    if dtype is torch.bool:
        return not largest
    if dtype.is_floating_point:
        return float("-inf" if largest else "inf")
    limits = torch.iinfo(dtype)
    return limits.min if largest else limits.max
