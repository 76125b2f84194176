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


@rule(aten.flip.default, aten.roll.default)
def flip(x: torch.Tensor, *given: Any) -> Rule:
    dims = given[-1] if given[-1] else list(range(x.dim()))
    names = mark(letters(x), [dims] if isinstance(dims, int) else dims)
    return parse(f"{names} -> {names}", [{0}])


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
