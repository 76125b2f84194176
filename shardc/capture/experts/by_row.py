"""Functions of torch that work on each row by itself: where the rows are in their result.

by_row("linear", (x, w), {}, dim=0)     0: row i of the result is made of row i of x alone
by_row("cumsum", (x, 0), {}, dim=0)     None
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from shardc.capture.experts.choices import moved

RowsOf = Callable[[Any], int | None]
"""The dim of the selected rows in a tensor, None for a tensor that is not made of them."""
_VIEWS = ("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "expand_as", "view_as")
_LAST = ("layer_norm", "rms_norm", "normalize", "group_norm")
_ALONG = ("softmax", "log_softmax", "chunk", "split", "glu", "sum", "mean", "tensor_split", "unbind", "norm", "softmin")
_COPIES = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone")
_PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "einsum")


def by_row(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: RowsOf, result: Any) -> int | None:
    """The dim of the rows in `result`, what a function of torch called `name` returned; None if it mixes them."""
    first: Any = next(iter(args), None)
    dim = rows(first)
    if name in _PRODUCTS:
        return _product(name, args, rows)
    if name == "cat" or name == "stack":
        return _joined(name, args, kwargs, rows)
    if elementwise(name):
        return _aligned((args, kwargs), rows, result)
    if dim is None or not isinstance(first, Tensor):
        return None
    if name in _COPIES:
        return dim
    if name in _VIEWS:
        return _viewed(first, dim, result)
    if name in ("permute", "transpose", "movedim", "t", "T", "mT"):
        order = moved(name, args, kwargs, first.ndim)
        return None if order is None else order.index(dim)
    if name == "__getitem__":
        return _indexed(args[1], first, dim)
    if name in ("dropout", "dropout_"):
        given = dict(zip(("p", "training"), args[1:], strict=False)) | dict(kwargs)
        idle = given.get("p", 0.5) == 0 or not given.get("training", True)
        return dim if idle else None
    if name in _LAST:
        return _normalised(name, args, kwargs, first, dim)
    return _along(name, args, kwargs, first, dim) if name in _ALONG else None


@cache
def elementwise(name: str) -> bool:
    """Whether a function computes each element of its result of the elements at that place."""
    plain = name.strip("_")
    for candidate in (plain, plain.removeprefix("i"), plain.removeprefix("r"), {"truediv": "div"}.get(plain, plain)):
        packet = getattr(torch.ops.aten, {"itruediv": "div", "rtruediv": "div"}.get(candidate, candidate), None)
        if packet is not None and candidate:
            return any(torch.Tag.pointwise in getattr(packet, one).tags for one in packet.overloads())
    return False


def _aligned(given: Any, rows: RowsOf, result: Any) -> int | None:
    if not isinstance(result, Tensor):
        return None
    dims = set[int]()
    tensors = [one for one in (*given[0], *given[1].values()) if isinstance(one, Tensor)]
    for one in tensors:
        dim = rows(one)
        if dim is not None:
            dims.add(dim - one.ndim)
    if len(dims) != 1:
        return None
    from_end = dims.pop()
    for one in tensors:
        if rows(one) is None and one.ndim >= -from_end and one.shape[from_end] != 1:
            return None
    return result.ndim + from_end


def _product(name: str, args: tuple[Any, ...], rows: RowsOf) -> int | None:
    if name == "einsum":
        return _einsum(args, rows)
    dim, others = rows(args[0]), args[1:]
    if dim is None or any(rows(other) is not None for other in others) or dim == args[0].ndim - 1:
        return None
    if name == "linear":
        return dim
    return dim if isinstance(others[0], Tensor) and others[0].ndim == 2 else None


def _einsum(args: tuple[Any, ...], rows: RowsOf) -> int | None:
    equation, operands = args[0], args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    terms, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation:
        return None
    letters = {
        term[dim]
        for term, operand in zip(terms.split(","), operands, strict=True)
        if (dim := rows(operand)) is not None
    }
    if len(letters) != 1:
        return None
    letter = letters.pop()
    elsewhere = [t for t, o in zip(terms.split(","), operands, strict=True) if rows(o) is None and letter in t]
    return None if elsewhere or letter not in result else result.index(letter)


def _joined(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: RowsOf) -> int | None:
    tensors, *rest = args
    dims = {rows(one) for one in tensors}
    along = kwargs.get("dim", rest[0] if rest else 0)
    dim = dims.pop() if len(dims) == 1 else None
    if dim is None:
        return None
    rank = tensors[0].ndim + (name == "stack")
    along %= rank
    if name == "stack":
        return dim + (along <= dim)
    return dim if along != dim else None


def _viewed(source: Tensor, dim: int, result: Tensor) -> int | None:
    before, count = math.prod(source.shape[:dim]), source.shape[dim]
    for place, size in enumerate(result.shape):
        if size == count and math.prod(result.shape[:place]) == before:
            return place
    return None


def _indexed(key: Any, source: Tensor, dim: int) -> int | None:
    """Of an index that takes all rows."""
    parts = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(part, (Tensor, list)) for part in parts):
        return None
    if Ellipsis in parts:
        place, used = parts.index(Ellipsis), sum(1 for part in parts if part is not None) - 1
        parts[place : place + 1] = [slice(None)] * (source.ndim - used)
    at, made = 0, 0
    for part in parts:
        if part is None:
            made += 1
            continue
        if at == dim:
            return made if part == slice(None) else None
        at += 1
        made += isinstance(part, slice)
    return made + dim - at


def _normalised(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor, dim: int) -> int | None:
    if name == "group_norm":
        return None
    if name == "normalize":
        along = kwargs.get("dim", args[2] if len(args) > 2 else 1)
        return dim if isinstance(along, int) and along % x.ndim != dim else None
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    return dim if dim < x.ndim - len(shape) else None


def _along(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor, dim: int) -> int | None:
    """Of a function that goes along other dims than that of the rows."""
    place = 2 if name in ("chunk", "split", "tensor_split", "norm") else 1
    usual = {"chunk": 0, "split": 0, "tensor_split": 0, "unbind": 0, "glu": -1}.get(name)
    given = kwargs.get("dim", args[place] if len(args) > place else usual)
    if given is None:
        return None
    along = {one % x.ndim for one in (given if isinstance(given, (tuple, list)) else (given,))}
    if dim in along:
        return None
    fewer = name == "unbind" or (
        name in ("sum", "mean", "norm") and not kwargs.get("keepdim", args[place + 1 :] == (True,))
    )
    return dim - sum(one < dim for one in along) if fewer else dim
