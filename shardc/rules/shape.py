"""Operators that move elements within a dim (slice, cat, pad, flip): that dim stays whole, the others pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from shardc.rules.notation import Rule, letters, mark, parse, rule

aten = torch.ops.aten


def _resized(x: torch.Tensor, dims: Sequence[int], sizes: Sequence[int] | None = None) -> tuple[str, str]:
    """Rule text of an operand and of a result whose `dims` have other sizes."""
    names, chosen = letters(x), {d % x.dim() for d in dims}
    after = [f"o{i}" if i in chosen else n for i, n in enumerate(names)]
    if sizes is not None:
        after = ["1" if sizes[i] == 1 else n for i, n in enumerate(after)]
    return mark(names, dims), " ".join(f"{n}!" if n.startswith("o") else n for n in after)


@rule(aten.slice.Tensor)
def slice_(x: torch.Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Rule:
    first, last, _ = slice(start, end, step).indices(x.shape[dim])
    if (first, last, step) == (0, x.shape[dim], 1):
        return parse(f"{' '.join(letters(x))} -> {' '.join(letters(x))}", [{0}])
    sizes = list(x.shape)
    sizes[dim] = len(range(first, last, step))
    left, right = _resized(x, [dim], sizes)
    return parse(f"{left} -> {right}", [{0}])


@rule(aten.slice_backward.default)
def slice_backward(grad: torch.Tensor, sizes: Sequence[int], dim: int, *_: object) -> Rule:
    left, right = _resized(grad, [dim], sizes)
    return parse(f"{left} -> {right}", [{0}], sizes={1: 0})


@rule(aten.select.int)
def select(x: torch.Tensor, dim: int, index: int) -> Rule:
    del index
    names = letters(x)
    right = " ".join(n for i, n in enumerate(names) if i != dim % x.dim())
    return parse(f"{mark(names, [dim])} -> {right}", [{0}])


@rule(aten.select_backward.default)
def select_backward(grad: torch.Tensor, sizes: Sequence[int], dim: int, index: int) -> Rule:
    del index
    names = letters(grad)
    after = [*names]
    after.insert(dim % len(sizes), "o!" if sizes[dim] != 1 else "1")
    return parse(f"{' '.join(names)} -> {' '.join(after)}", [{0}], sizes={1: 0})


@rule(aten.cat.default)
def cat(parts: Sequence[torch.Tensor], dim: int = 0) -> Rule:
    rank = max(x.dim() for x in parts)
    named: list[str] = []
    for k, x in enumerate(parts):
        if x.dim() != rank:  # torch lets an empty 1-d tensor join any cat
            named.append(f"e{k}!" if x.shape[0] != 1 else "1")
            continue
        own = letters(x)
        own[dim] = f"p{k}!" if x.shape[dim] != 1 else "1"
        named.append(" ".join(own))
    model = next(x for x in parts if x.dim() == rank)
    after = letters(model)
    total = sum(x.shape[dim] for x in parts if x.dim() == rank)
    after[dim] = "o!" if total != 1 else "1"
    return parse(f"{', '.join(named)} -> {' '.join(after)}", [set(range(len(parts)))])


def _parts(x: torch.Tensor, dim: int, sizes: Sequence[int]) -> Rule:
    names = letters(x)
    results: list[str] = []
    for k, size in enumerate(sizes):
        own = [*names]
        own[dim] = f"o{k}!" if size != 1 else "1"
        results.append(" ".join(own))
    return parse(f"{mark(names, [dim])} -> {', '.join(results)}", [{0}])


@rule(aten.split.Tensor)
def split(x: torch.Tensor, size: int, dim: int = 0) -> Rule:
    total = x.shape[dim]
    return _parts(x, dim, [min(size, total - i) for i in range(0, max(total, 1), size)])


@rule(aten.split_with_sizes.default)
def split_with_sizes(x: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> Rule:
    return _parts(x, dim, sizes)


@rule(aten.unbind.int)
def unbind(x: torch.Tensor, dim: int = 0) -> Rule:
    names = letters(x)
    right = " ".join(n for i, n in enumerate(names) if i != dim % x.dim())
    return parse(f"{mark(names, [dim])} -> {', '.join([right] * x.shape[dim])}", [{0}])


@rule(aten.stack.default)
def stack(parts: Sequence[torch.Tensor], dim: int = 0) -> Rule:
    names = letters(parts[0])
    after = [*names]
    after.insert(dim % (len(names) + 1), "o!" if len(parts) != 1 else "1")
    return parse(f"{', '.join([' '.join(names)] * len(parts))} -> {' '.join(after)}", [set(range(len(parts)))])


@rule(aten.constant_pad_nd.default)
def pad(x: torch.Tensor, amounts: Sequence[int], value: float = 0) -> Rule:
    padded = [x.dim() - 1 - i for i in range(len(amounts) // 2)]
    left, right = _resized(x, padded)
    return parse(f"{left} -> {right}", [{0}] if value == 0 else [])


@rule(aten.flip.default)
def flip(x: torch.Tensor, dims: Sequence[int]) -> Rule:
    names = mark(letters(x), dims)
    return parse(f"{names} -> {names}", [{0}])


@rule(aten.roll.default)
def roll(x: torch.Tensor, shifts: object, dims: Sequence[int] = ()) -> Rule:
    """Without dims the flattened tensor is rolled."""
    del shifts
    names = mark(letters(x), dims or range(x.dim()))
    return parse(f"{names} -> {names}", [{0}])


@rule(aten.repeat.default)
def repeat(x: torch.Tensor, times: Sequence[int]) -> Rule:
    """Dims that are not repeated pass."""
    names, added = letters(x), len(times) - x.dim()
    repeated = [i for i in range(x.dim()) if times[i + added] != 1]
    after = [f"o{i}!" if n != 1 else "1" for i, n in enumerate(times[:added])]
    for i, name in enumerate(names):
        after.append(name if i not in repeated else f"r{i}!" if times[i + added] * x.shape[i] != 1 else "1")
    return parse(f"{mark(names, repeated)} -> {' '.join(after)}", [{0}])


def _diagonal(names: list[str], length: int, first: int, second: int) -> tuple[str, str]:
    """Rule text of a tensor and of its diagonal, which stands last."""
    rank = len(names)
    chosen = {first % rank, second % rank}
    rest = " ".join(n for i, n in enumerate(names) if i not in chosen)
    return mark(names, chosen), f"{rest} {'o!' if length != 1 else '1'}"


@rule(aten.diagonal.default)
def diagonal(x: torch.Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Rule:
    full, diag = _diagonal(letters(x), x.diagonal(offset, dim1, dim2).shape[-1], dim1, dim2)
    return parse(f"{full} -> {diag}", [{0}])


@rule(aten.diagonal_backward.default)
def diagonal_backward(grad: torch.Tensor, sizes: Sequence[int], offset: int, dim1: int, dim2: int) -> Rule:
    del offset
    names = [f"d{i}" if n != 1 else "1" for i, n in enumerate(sizes)]
    full, diag = _diagonal(names, grad.shape[-1], dim1, dim2)
    return parse(f"{diag} -> {full}", [{0}], sizes={1: 0})


@rule(aten.unfold.default)
def unfold(x: torch.Tensor, dim: int, size: int, step: int) -> Rule:
    left, right = _resized(x, [dim], list(x.unfold(dim, size, step).shape)[:-1])
    return parse(f"{left} -> {right} {'w!' if size != 1 else '1'}", [{0}])


@rule(aten.unfold_backward.default)
def unfold_backward(grad: torch.Tensor, sizes: Sequence[int], dim: int, size: int, step: int) -> Rule:
    del step
    names = [f"d{i}" if n != 1 else "1" for i, n in enumerate(sizes)]
    before = [*names]
    before[dim] = "o!" if grad.shape[dim if dim >= 0 else dim - 1] != 1 else "1"
    return parse(f"{' '.join(before)} {'w!' if size != 1 else '1'} -> {mark(names, [dim])}", [{0}], sizes={1: 0})


@rule(aten.tril.default, aten.triu.default)
def triangle(x: torch.Tensor, diagonal: int = 0) -> Rule:
    del diagonal
    names = mark(letters(x), [-1, -2])
    return parse(f"{names} -> {names}", [{0}])


@rule(aten.view.default)
def opaque_view(x: torch.Tensor, size: Sequence[int]) -> Rule:
    """A view that cuts across atoms: only the leading dims that it leaves alone pass."""
    shape = [int(s) for s in size]
    if -1 in shape:
        shape[shape.index(-1)] = x.numel() // -math.prod(shape)
    kept = 0
    while kept < min(len(shape), x.dim()) and shape[kept] == x.shape[kept]:
        kept += 1
    names = letters(x)
    after = names[:kept] + [f"o{i}!" if n != 1 else "1" for i, n in enumerate(shape) if i >= kept]
    return parse(f"{mark(names, range(kept, x.dim()))} -> {' '.join(after)}", [{0}], sizes={1: 0})


@rule(torch.ops.shardc.retile.default)
def retile(x: torch.Tensor, dims: Sequence[int]) -> Rule:
    """The identity whose `dims` have other atoms before and after."""
    before, after = letters(x), letters(x)
    for dim in dims:
        before[dim], after[dim] = f"i{dim}!", f"o{dim}!"
    return parse(f"{' '.join(before)} -> {' '.join(after)}", [{0}])
