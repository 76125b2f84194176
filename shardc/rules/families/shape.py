"""Operators that move elements within a dim (slice, cat, pad, flip).

Where such a dim is split, every rank moves the elements that it holds. Reading from the dim gives addends of the
result. Writing into it needs nothing from other ranks.

Of a value that is the same for all of the batch, a micro-batch has a part, or an addend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardc.rules.notation import Body, Rule, Send, letters, mark, parse, rule
from shardc.runtime.collectives.permute import permute
from shardc.runtime.kernels import moves, shifts
from shardc.runtime.kernels.parts import addend_of_microbatch, part_of_microbatch

aten = torch.ops.aten
MANY = 4
"""`cat` of more operands keeps the dim whole, because each operand that may be split multiplies the strategies."""


def _named(x: torch.Tensor, dim: int, name: str) -> list[str]:
    """Names of a tensor's dims, where `dim` is called `name`."""
    names = letters(x)
    if names and x.shape[dim] != 1:
        names[dim] = name
    return names


def _text(*tensors: list[str]) -> str:
    return ", ".join(" ".join(names) for names in tensors)


@rule(aten.slice.Tensor)
def slice_(x: torch.Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Rule:
    first, last, _ = slice(start, end, step).indices(x.shape[dim])
    if (first, last, step) == (0, x.shape[dim], 1):
        return parse(f"{' '.join(letters(x))} -> {' '.join(letters(x))}", [{0}])
    after = letters(x)
    after[dim] = "o!" if len(range(first, last, step)) != 1 else "1"
    return parse(f"{_text(_named(x, dim, 's:sum~'))} -> {_text(after)}", [{0}], body=moves.slice_along)


@rule(aten.slice_backward.default)
def slice_backward(grad: torch.Tensor, sizes: Sequence[int], dim: int, *_: object) -> Rule:
    if grad.shape[dim] == sizes[dim]:
        return parse(f"{_text(letters(grad))} -> {_text(letters(grad))}", [{0}], sizes={1: 0})
    after = letters(grad)
    after[dim] = "o~" if sizes[dim] != 1 else "1"
    text = f"{_text(_named(grad, dim, 's:sum~'))} -> {_text(after)}"
    return parse(text, [{0}], sizes={1: 0}, body=moves.slice_backward)


@rule(aten.select.int)
def select(x: torch.Tensor, dim: int, index: int) -> Rule:
    del index
    right = [n for i, n in enumerate(letters(x)) if i != dim % x.dim()]
    return parse(f"{_text(_named(x, dim, 's:sum~'))} -> {_text(right)}", [{0}], body=moves.select_along)


@rule(aten.select_backward.default)
def select_backward(grad: torch.Tensor, sizes: Sequence[int], dim: int, index: int) -> Rule:
    del index
    after = letters(grad)
    after.insert(dim % len(sizes), "o~" if sizes[dim] != 1 else "1")
    text = f"{_text(letters(grad))} -> {_text(after)}"
    return parse(text, [{0}], sizes={1: 0}, body=moves.select_backward)


@rule(aten.cat.default)
def cat(parts: Sequence[torch.Tensor], dim: int = 0) -> Rule:
    rank = max(x.dim() for x in parts)
    sign = ":sum~" if len(parts) <= MANY else "!"
    # torch lets an empty tensor of one dim join any cat
    named = [
        _named(x, dim, f"p{k}{sign}") if x.dim() == rank else [f"e{k}!" if x.shape[0] != 1 else "1"]
        for k, x in enumerate(parts)
    ]
    joined = [x for x in parts if x.dim() == rank]
    after = letters(joined[0])
    after[dim] = "o~" if sum(x.shape[dim] for x in joined) != 1 else "1"
    return parse(f"{_text(*named)} -> {_text(after)}", [set(range(len(parts)))], body=moves.cat_along)


def _parts(x: torch.Tensor, dim: int, sizes: Sequence[int]) -> Rule:
    results: list[list[str]] = []
    for k, size in enumerate(sizes):
        names = letters(x)
        names[dim] = f"o{k}!" if size != 1 else "1"
        results.append(names)
    return parse(f"{_text(_named(x, dim, 's:sum~'))} -> {_text(*results)}", [{0}], body=moves.split_along)


@rule(aten.split.Tensor)
def split(x: torch.Tensor, size: int, dim: int = 0) -> Rule:
    total = x.shape[dim]
    return _parts(x, dim, [min(size, total - i) for i in range(0, max(total, 1), size)])


@rule(aten.split_with_sizes.default)
def split_with_sizes(x: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> Rule:
    return _parts(x, dim, sizes)


@rule(aten.unbind.int)
def unbind(x: torch.Tensor, dim: int = 0) -> Rule:
    right = [n for i, n in enumerate(letters(x)) if i != dim % x.dim()]
    text = f"{_text(_named(x, dim, 's:sum~'))} -> {_text(*[right] * x.shape[dim])}"
    return parse(text, [{0}], body=moves.unbind_along)


@rule(aten.stack.default)
def stack(parts: Sequence[torch.Tensor], dim: int = 0) -> Rule:
    names = letters(parts[0])
    after = [*names]
    after.insert(dim % (len(names) + 1), "o~" if len(parts) != 1 else "1")
    text = f"{_text(*[names] * len(parts))} -> {_text(after)}"
    return parse(text, [set(range(len(parts)))], body=moves.stack_along)


@rule(aten.constant_pad_nd.default)
def pad(x: torch.Tensor, amounts: Sequence[int], value: float = 0) -> Rule:
    before, after = letters(x), letters(x)
    for number in range(len(amounts) // 2):
        dim, change = x.dim() - 1 - number, sum(amounts[2 * number : 2 * number + 2])
        if amounts[2 * number] or amounts[2 * number + 1]:
            before[dim] = f"s{dim}:sum~" if x.shape[dim] != 1 else "1"
            after[dim] = f"o{dim}~" if x.shape[dim] + change != 1 else "1"
    text = f"{_text(before)} -> {_text(after)}"
    return parse(text, [{0}] if value == 0 else [], body=moves.constant_pad)


def divisors(size: int) -> list[int]:
    """The numbers of even parts, two or more, of a dim of `size` elements."""
    return [n for n in range(2, size + 1) if size % n == 0]


def _around(x: torch.Tensor, dim: int) -> tuple[str, ...]:
    """The factors of the dims around `dim`."""
    return tuple(n for i, n in enumerate(letters(x)) if i != dim and n != "1")


@rule(aten.flip.default)
def flip(x: torch.Tensor, dims: Sequence[int]) -> Rule:
    chosen = {d % x.dim() for d in dims}
    names = mark(letters(x), chosen, "~")
    factors = tuple(n for n in letters(x) if n != "1")
    return parse(
        f"{names} -> {names}", [{0}], body=shifts.flip, parts={f"d{i}": divisors(x.shape[i]) for i in chosen},
        sends={f"d{i}": [Send(permute, factors, x.element_size())] for i in chosen},
    )  # fmt: skip


@rule(aten.roll.default)
def roll(x: torch.Tensor, by: int | Sequence[int], dims: int | Sequence[int] = ()) -> Rule:
    """Without dims, the flattened tensor is rolled, so all dims stay whole."""
    amounts = [by] if isinstance(by, int) else list(by)
    chosen = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)]
    if not chosen or len(set(chosen)) < len(chosen):
        names = mark(letters(x), range(x.dim()))
        return parse(f"{names} -> {names}", [{0}])
    names, sends = mark(letters(x), chosen, "~"), dict[str, list[Send]]()
    for amount, dim in zip(amounts, chosen, strict=True):
        sends[f"d{dim}"] = [
            Send(permute, _around(x, dim), x.element_size(), rows, parts=count)
            for count in divisors(x.shape[dim])
            for far, rows in shifts.pieces(amount, x.shape[dim], count)
            if far
        ]
    return parse(
        f"{names} -> {names}", [{0}], body=shifts.roll, sends=sends,
        parts={f"d{i}": divisors(x.shape[i]) for i in chosen},
    )  # fmt: skip


@rule(aten.repeat.default)
def repeat(x: torch.Tensor, times: Sequence[int]) -> Rule:
    """Dims that are not repeated split freely. New dims split too: a rank makes the copies of its part."""
    names, added = letters(x), len(times) - x.dim()
    repeated = [i for i in range(x.dim()) if times[i + added] != 1]
    after = [f"o{i}" if n != 1 else "1" for i, n in enumerate(times[:added])]
    sizes = tuple(name if name != "1" else 1 for name in after) + tuple(times[added:])
    for i, name in enumerate(names):
        after.append(name if i not in repeated else f"r{i}!" if times[i + added] * x.shape[i] != 1 else "1")
    return parse(f"{mark(names, repeated)} -> {' '.join(after)}", [{0}], sizes={1: sizes})


@rule(aten.diagonal.default)
def diagonal(x: torch.Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Rule:
    chosen = {dim1 % x.dim(), dim2 % x.dim()}
    length = x.diagonal(offset, dim1, dim2).shape[-1]
    full = [f"{n}:sum~" if i in chosen and n != "1" else n for i, n in enumerate(letters(x))]
    diag = [*(n for i, n in enumerate(letters(x)) if i not in chosen), "o!" if length != 1 else "1"]
    return parse(f"{_text(full)} -> {_text(diag)}", [{0}], body=moves.diagonal)


@rule(aten.diagonal_backward.default)
def diagonal_backward(grad: torch.Tensor, sizes: Sequence[int], offset: int, dim1: int, dim2: int) -> Rule:
    del offset
    names, chosen = [f"d{i}" if n != 1 else "1" for i, n in enumerate(sizes)], {dim1 % len(sizes), dim2 % len(sizes)}
    diag = [*(n for i, n in enumerate(names) if i not in chosen), "o!" if grad.shape[-1] != 1 else "1"]
    text = f"{_text(diag)} -> {mark(names, chosen, '~')}"
    return parse(text, [{0}], sizes={1: 0}, body=moves.diagonal_backward)


def _resized(x: torch.Tensor, dims: Sequence[int], sizes: Sequence[int]) -> tuple[str, str]:
    """Rule texts of an operand, and of a result whose `dims` have other sizes."""
    names, chosen = letters(x), {d % x.dim() for d in dims}
    after = [f"o{i}!" if i in chosen else n for i, n in enumerate(names)]
    return mark(names, dims), " ".join("1" if sizes[i] == 1 else n for i, n in enumerate(after))


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


def _triangle(body: Body) -> Callable[..., Rule]:
    def maker(x: torch.Tensor, diagonal: int = 0) -> Rule:
        del diagonal
        names = mark(letters(x), [-1, -2], "~")
        return parse(f"{names} -> {names}", [{0}], body=body)

    return maker


rule(aten.tril.default)(_triangle(moves.tril))
rule(aten.triu.default)(_triangle(moves.triu))


@rule(aten.view.default)
def opaque_view(x: torch.Tensor, size: Sequence[int]) -> Rule:
    """A view that cuts across atoms. Only the leading and trailing dims that it does not change split freely."""
    shape = [int(s) for s in size]
    if -1 in shape:
        shape[shape.index(-1)] = x.numel() // -math.prod(shape)
    first = last = 0
    while first < min(len(shape), x.dim()) and shape[first] == x.shape[first]:
        first += 1
    while last < min(len(shape), x.dim()) - first and shape[-1 - last] == x.shape[-1 - last]:
        last += 1
    names = letters(x)
    inner = [f"o{i}!" if n != 1 else "1" for i, n in enumerate(shape) if first <= i < len(shape) - last]
    after = [*names[:first], *inner, *names[len(names) - last :]]
    return parse(f"{mark(names, range(first, x.dim() - last))} -> {_text(after)}", [{0}], sizes={1: 0})


@rule(torch.ops.shardc.retile.default)
def retile(x: torch.Tensor, dims: Sequence[int]) -> Rule:
    """The identity, where `dims` have other atoms before and after."""
    before, after = letters(x), letters(x)
    for dim in dims:
        before[dim], after[dim] = f"i{dim}!", f"o{dim}!"
    return parse(f"{' '.join(before)} -> {' '.join(after)}", [{0}])


@rule(torch.ops.shardc.checked.default)
def checked(x: torch.Tensor, info: torch.Tensor, *_: object) -> Rule:
    """`info` stays whole, so that every rank sees all failures and all ranks stop together."""
    names = " ".join(letters(x))
    return parse(f"{names}, {mark(letters(info, 'i'), range(info.dim()))} -> {names}")


@rule(torch.ops.shardc.confirmed.default)
def confirmed(x: torch.Tensor, *_: object) -> Rule:
    names = " ".join(letters(x))
    return parse(f"{names},  -> {names}", [{0}])


@rule(part_of_microbatch)
def part(x: torch.Tensor, *, dim: int, **_: Any) -> Rule:
    """The dim that is parted stays whole: its parts are not where the chunks of ranks are."""
    names = letters(x)
    made = [*names]
    made[dim] = "part"
    return parse(f"{mark(names, [dim])} -> {mark(made, [dim])}", [{0}])


@rule(addend_of_microbatch)
def addend(x: torch.Tensor, **_: Any) -> Rule:
    names = " ".join(letters(x))
    return parse(f"{names} -> {names}", [{0}])
