"""Operators that move elements along a dim that the mesh splits. Nothing is sent: every rank moves what it holds.

Where the dim of the operand is split, a rank writes the elements that it holds and zeros elsewhere, so the results of
all ranks add up. Where the dim of the result is split, a rank keeps what falls into its part. Part `s` is of a dim of
the operand, part `o` of a dim of the result. Where there are several, the number of the dim follows: `s1`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.kernels.parts import Part, by_dim

__all__ = [
    "arange",
    "cat_along",
    "constant_pad",
    "diagonal",
    "diagonal_backward",
    "eye",
    "linspace",
    "select_along",
    "select_backward",
    "slice_along",
    "slice_backward",
    "split_along",
    "stack_along",
    "tril",
    "triu",
    "unbind_along",
]


def slice_along(x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1, *, s: Part) -> Tensor:
    """`aten.slice` of `dim`; this rank holds part `s` of it and returns its addend of the result."""
    first, last, _ = slice(start, end, step).indices(s.size)
    if step == 1:
        result = _zeros(x, dim, max(last - first, 0))
        _copy(result, x, dim, -first, None, s)
        return result
    return _taken(x, dim, torch.arange(first, last, step, device=x.device), s)


def slice_backward(
    grad: Tensor, sizes: Sequence[int], dim: int, start: Any, end: Any, step: int, *, s: Part | None = None,
    o: Part | None = None,
) -> Tensor:  # fmt: skip
    """`aten.slice_backward`: zeros, with the gradient where the slice was. `sizes` is the local shape of the result."""
    first = slice(start, end, step).indices(o.size if o else sizes[dim])[0]
    if step == 1:
        result = _zeros(grad, dim, sizes[dim])
        _copy(result, grad, dim, first, o, s)
        return result
    reach = torch.arange(sizes[dim], device=grad.device) + (o.start if o else 0)
    places = torch.div(reach - first, step, rounding_mode="floor")
    return _taken(grad, dim, torch.where((reach - first) % step == 0, places, -1), s)


def select_along(x: Tensor, dim: int, index: int, *, s: Part) -> Tensor:
    """`aten.select` from `dim`; this rank holds part `s` of it and returns its addend of the result."""
    return _taken_one(x, dim, index % s.size, s)


def select_backward(grad: Tensor, sizes: Sequence[int], dim: int, index: int, *, o: Part) -> Tensor:
    """`aten.select_backward` into `dim`; this rank holds part `o` of it. `sizes` is the local shape of the result."""
    row = grad.unsqueeze(dim % len(sizes))
    result = _zeros(row, dim % len(sizes), o.length)
    _copy(result, row, dim % len(sizes), index % o.size, o, None)
    return result


def unbind_along(x: Tensor, dim: int = 0, *, s: Part) -> list[Tensor]:
    """`aten.unbind` of `dim`; this rank holds part `s` of it and returns its addends of the results."""
    return [_taken_one(x, dim, index, s) for index in range(s.size)]


def split_along(x: Tensor, sizes: int | Sequence[int], dim: int = 0, *, s: Part) -> list[Tensor]:
    """`aten.split` of `dim`; this rank holds part `s` of it and returns its addends of the results."""
    if isinstance(sizes, int):
        sizes = [min(sizes, s.size - at) for at in range(0, s.size, sizes)]
    results = [_zeros(x, dim, size) for size in sizes]
    at = 0
    for result in results:
        _copy(result, x, dim, -at, None, s)
        at += result.shape[dim]
    return results


def cat_along(tensors: Sequence[Tensor], dim: int = 0, *, o: Part | None = None, **parts: Part) -> Tensor:
    """`aten.cat`; this rank holds part `p2` of the dim of operand 2. It returns its addend, or that of its part `o`."""
    rank = max(x.dim() for x in tensors)  # cat ignores empty tensors of one dim
    joined = [(parts.get(f"p{k}"), x) for k, x in enumerate(tensors) if x.dim() == rank]
    sizes = [part.size if part else x.shape[dim] for part, x in joined]
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    result = _zeros(joined[0][1], dim, o.length if o else sum(sizes), dtype)
    for number, (part, x) in enumerate(joined):
        _copy(result, x, dim, sum(sizes[:number]), o, part)
    return result


def stack_along(tensors: Sequence[Tensor], dim: int = 0, *, o: Part) -> Tensor:
    """`aten.stack` into `dim`; this rank holds part `o` of it."""
    return torch.stack([tensors[min(o.start + at, len(tensors) - 1)] for at in range(o.length)], dim)


def constant_pad(x: Tensor, amounts: Sequence[int], value: float = 0, **parts: Part) -> Tensor:
    """`aten.constant_pad_nd` with parts `s1` of dim 1 of `x` and `o1` of the result's dim 1."""
    shape = list(x.shape)
    operand_region, target_region, source_region = ([slice(None)] * x.dim() for _ in range(3))
    for number in range(len(amounts) // 2):
        dim, (before, after) = x.dim() - 1 - number, amounts[2 * number : 2 * number + 2]
        s, o = parts.get(f"s{dim}"), parts.get(f"o{dim}")
        size = s.size if s else x.shape[dim]
        shape[dim] = o.length if o else before + size + after
        reach, (low, high) = _reach(o, shape[dim]), _reach(s, size)
        operand_region[dim] = _common(reach, (before, before + size), reach[0])
        target_region[dim] = _common(reach, (low + before, high + before), reach[0])
        source_region[dim] = _common((reach[0] - before, reach[1] - before), (low, high), low)
    operand_parts = [part for name, part in parts.items() if name.startswith("s")]
    # one addend has the value around the operand; where the operand lands, all others have zeros
    result = x.new_full(shape, value if all(part.index == 0 for part in operand_parts) else 0)
    result[tuple(operand_region)] = 0
    result[tuple(target_region)] = x[tuple(source_region)]
    return result


def diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1, **parts: Part) -> Tensor:
    """`aten.diagonal`; this rank holds parts `d0`, ... of the dims of `x` and returns its addend."""
    dims, parts_by_dim = (dim1 % x.dim(), dim2 % x.dim()), by_dim(parts)
    rows, columns = (parts_by_dim[d].size if d in parts_by_dim else x.shape[d] for d in dims)
    length = max(min(rows, rows + offset, columns, columns - offset), 0)
    local, start = _local_diagonal(x, offset, dims, parts_by_dim)
    result = x.new_zeros([*local.shape[:-1], length])
    result.narrow(-1, start, local.shape[-1]).copy_(local)
    return result


def diagonal_backward(grad: Tensor, sizes: Sequence[int], offset: int, dim1: int, dim2: int, **parts: Part) -> Tensor:
    """`aten.diagonal_backward`; this rank holds parts `d0`, ... of the dims of the result. `sizes` is its local
    shape."""
    dims, parts_by_dim = (dim1 % len(sizes), dim2 % len(sizes)), by_dim(parts)
    shape = [*grad.shape[:-1]]
    for dim in sorted(dims):
        shape.insert(dim, sizes[dim])
    result = grad.new_zeros(shape)
    local, start = _local_diagonal(result, offset, dims, parts_by_dim)
    local.copy_(grad.narrow(-1, start, local.shape[-1]))
    return result


def _local_diagonal(x: Tensor, offset: int, dims: tuple[int, int], parts: Mapping[int, Part]) -> tuple[Tensor, int]:
    """The elements of the global diagonal that the local `x` has, as a view, and the global index of the first."""
    starts: list[int] = []
    for dim in dims:
        low, high = _reach(parts.get(dim), x.shape[dim])
        starts.append(low)
        x = x.narrow(dim, 0, high - low)
    skew = offset + starts[0] - starts[1]
    local = x.diagonal(skew, *dims)
    first = max(-skew, 0) + starts[0] - max(-offset, 0)
    return local, first if local.shape[-1] else 0


def tril(x: Tensor, diagonal: int = 0, **parts: Part) -> Tensor:
    """`aten.tril`; this rank holds the given parts of the last two dims of `x`."""
    return torch.tril(x, diagonal + _skew(x, parts))


def triu(x: Tensor, diagonal: int = 0, **parts: Part) -> Tensor:
    """`aten.triu`; this rank holds the given parts of the last two dims of `x`."""
    return torch.triu(x, diagonal + _skew(x, parts))


def _skew(x: Tensor, parts: Mapping[str, Part]) -> int:
    """The global index of the part's first row less that of its first column."""
    parts_by_dim = by_dim(parts)
    rows, columns = parts_by_dim.get(x.dim() - 2), parts_by_dim.get(x.dim() - 1)
    return (rows.start if rows else 0) - (columns.start if columns else 0)


def arange(*arguments: Any, n: Part, **keywords: Any) -> Tensor:
    """`aten.arange`; this rank makes part `n`."""
    return _cut(torch.arange(*arguments, **keywords), n)


def linspace(start: float, end: float, steps: int, *, n: Part, **keywords: Any) -> Tensor:
    """`aten.linspace`; this rank makes part `n`."""
    return _cut(torch.linspace(start, end, steps, **keywords), n)


def eye(rows: int, columns: int | None = None, *, dtype: torch.dtype | None = None, device: torch.device | None = None,
        **parts: Part) -> Tensor:  # fmt: skip
    """`aten.eye`; this rank makes part `d0` of the rows and part `d1` of the columns."""
    parts_by_dim = by_dim(parts)
    reach = [
        torch.arange(parts_by_dim[dim].length, device=device) + parts_by_dim[dim].start if dim in parts_by_dim
        else torch.arange(size, device=device)
        for dim, size in enumerate((rows, rows if columns is None else columns))
    ]  # fmt: skip
    return (reach[0].unsqueeze(1) == reach[1]).to(dtype or torch.get_default_dtype())


def _cut(x: Tensor, n: Part) -> Tensor:
    result = x.new_zeros(n.length)
    result[: n.valid] = torch.cat([x[start : start + length] for start, length in n.runs])
    return result


def _reach(part: Part | None, size: int) -> tuple[int, int]:
    """First and last (excluded) global position that the rank holds of a dim of `size` elements."""
    return (part.start, part.start + part.valid) if part else (0, size)


def _common(one: tuple[int, int], other: tuple[int, int], start: int) -> slice:
    """The overlap of two ranges, counted from `start`."""
    low, high = max(one[0], other[0]), min(one[1], other[1])
    return slice(low - start, high - start) if low < high else slice(0, 0)


def _zeros(x: Tensor, dim: int, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros of the shape of `x`, with `size` elements along `dim`."""
    shape = list(x.shape)
    shape[dim] = size
    return x.new_zeros(shape, dtype=dtype or x.dtype)


def _copy(result: Tensor, x: Tensor, dim: int, shift: int, o: Part | None, s: Part | None) -> None:
    """Copy element p of `dim` of `x` to element p + `shift` of `result`, if this rank holds both."""
    target, (low, high) = _reach(o, result.shape[dim]), _reach(s, x.shape[dim])
    to = _common(target, (low + shift, high + shift), target[0])
    source = _common((target[0] - shift, target[1] - shift), (low, high), low)
    result.narrow(dim, to.start, to.stop - to.start).copy_(x.narrow(dim, source.start, source.stop - source.start))


def _taken_one(x: Tensor, dim: int, index: int, s: Part) -> Tensor:
    """Element `index` of `dim`; zeros where another rank holds it."""
    low, high = _reach(s, 0)
    row = x.select(dim, min(max(index - low, 0), x.shape[dim] - 1))
    return row.clone() if low <= index < high else torch.zeros_like(row)


def _taken(x: Tensor, dim: int, places: Tensor, s: Part | None) -> Tensor:
    """`x` at the global `places` along `dim`; zeros for places that do not exist or that another rank holds."""
    low, high = _reach(s, x.shape[dim])
    held_here = (places >= low) & (places < high)
    rows = x.index_select(dim, torch.where(held_here, places - low, 0))
    shape = [1] * x.dim()
    shape[dim] = -1
    return torch.where(held_here.view(shape), rows, torch.zeros((), dtype=x.dtype, device=x.device))
