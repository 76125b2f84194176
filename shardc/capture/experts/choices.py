"""What is known of the numbers of chosen experts while a model is traced, and of what is made of them.

scores, ids = torch.topk(router(x), 2)      ids: Choices("tj"), a token and its choices, which are different
mask = F.one_hot(ids, 8).permute(2, 1, 0)   mask: Choices("ejt")
mask[3]                                     Choices("jt"): true for at most one choice of a token
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from shardc.capture.experts.counts import Chooser, Counts, Subject
from shardc.capture.torch_patches.attention.notes import Notes


@dataclass(frozen=True)
class Choices:
    """Each dim of the tensor: "t", of tokens; "j", of the choices of a token, which are different experts; "e", of
    experts; "c", of all choices."""

    kinds: str
    among: int = 0
    """How many experts there are, if that is known."""
    total: int = 0
    """How many choices the tensor shows, each of them once; 0 where that is not known."""
    chooser: Chooser = field(default_factory=Chooser)
    expert: int | None = None
    """Of a mask without a dim of experts: the one about which it is."""

    def subjects(self, shape: tuple[int, ...]) -> list[Subject] | None:
        """Which experts a mask is about, each of them if it has a dim of experts; None for what is no mask."""
        if "e" in self.kinds:
            return self.chooser.experts(shape[self.kinds.index("e")])
        return None if self.expert is None else [frozenset({(self.chooser, self.expert)})]


@dataclass(frozen=True)
class Same:
    """The elements of `source` in their order."""

    source: Tensor


_CHOOSE = ("topk", "sort", "argsort", "argmax", "max")
_COPIES = ("to", "bool", "int", "long", "float", "double", "half", "bfloat16", "clone", "contiguous", "type_as", "type")
_VIEWS = ("view", "reshape", "flatten", "unsqueeze", "squeeze", "unflatten")
_MOVES = ("permute", "transpose", "movedim", "swapaxes", "t")
_ANY = ("any", "sum", "amax")
_EQUAL = ("eq", "__eq__")
_WHOLE = (*_COPIES, *_VIEWS, *_MOVES, "T", "mT", "one_hot")


def note_choices(notes: Notes, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    """Note of the result of a function of torch called `name` what it says of choices."""
    if not args or not isinstance(args[0], Tensor):
        return
    if name in _CHOOSE:
        _chosen(notes, name, args, kwargs, result)
        known = notes.get(args[0], Choices)
        if name == "sort" and known is not None and args[0].ndim == 1:
            notes.put(result[0], replace(known, kinds="c"))
        return
    if not isinstance(result, Tensor):
        return
    if name in (*_VIEWS, "contiguous") and not result.is_floating_point() and result is not args[0]:
        notes.put(result, Same(origin(notes, args[0])) if result.numel() == args[0].numel() else None)
    known = notes.get(args[0], Choices)
    if known is None:
        return
    made = _kinds(known.kinds, name, args, kwargs, result)
    total = known.total if name in _WHOLE else 0
    of_mask = known.expert is not None or "e" in known.kinds
    if made is None or (name in _EQUAL and of_mask and (isinstance(args[1], Tensor) or args[1] != 1)):
        notes.put(result, None)
        return
    expert, chooser = known.expert, known.chooser
    if name in _EQUAL and expert is None and "e" not in known.kinds:
        expert = _number(notes, args[1])
    elif name == "__getitem__":
        parts = [part for part in _full(known.kinds, args[1]) if part is not None]
        if "e" in known.kinds and "e" not in made:
            expert = _number(notes, parts[known.kinds.index("e")])
        some = [parts[place] for place, kind in enumerate(known.kinds) if kind == "j" and place < len(parts)]
        if any(part != slice(None) for part in some):
            chooser = chooser.part(str(some))
    notes.put(result, Choices(made, known.among, total, chooser, expert))


def _number(notes: Notes, of: Any) -> int | None:
    """The number of an expert, where something is that."""
    counts = notes.get(of, Counts)
    known = counts.numbers if counts is not None else (of,)
    return known[0] if len(known) == 1 and isinstance(known[0], int) else None


def origin(notes: Notes, tensor: Tensor) -> Tensor:
    """The tensor of which this is a view with the same elements in the same order."""
    note = notes.get(tensor, Same)
    return tensor if note is None else origin(notes, note.source)


def _chosen(notes: Notes, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    ids = result if isinstance(result, Tensor) else result[1] if isinstance(result, tuple) else None
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        return
    place = 2 if name == "topk" else 1
    dim = kwargs.get("dim", args[place] if len(args) > place else None if name in ("argmax", "max") else -1)
    rank = args[0].ndim
    if isinstance(dim, bool) or not isinstance(dim, int) or not rank or dim % rank != rank - 1:
        return
    among = args[0].shape[-1]
    notes.put(ids, Choices("t" * (rank - 1) + "j" * (ids.ndim == rank), among, ids.numel(), Chooser(among)))


def _kinds(kinds: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> str | None:
    source: Tensor = args[0]
    if name in _COPIES:
        return kinds
    if name in _EQUAL:
        return _compared(kinds, args[1], result)
    if name == "one_hot":
        return kinds + "e"
    if name in _MOVES or name in ("T", "mT"):
        order = moved(name, args, kwargs, source.ndim)
        return None if order is None else "".join(kinds[dim] for dim in order)
    if name in _VIEWS:
        return _viewed(kinds, tuple(source.shape), tuple(result.shape)) or ("c" if result.ndim == 1 else None)
    if name in _ANY:
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dims is None or isinstance(dims, bool) or not source.ndim:
            return None
        gone = {dim % source.ndim for dim in (dims if isinstance(dims, (tuple, list)) else (dims,))}
        if any(kinds[dim] != "j" for dim in gone) or kwargs.get("keepdim", len(args) > 2 and args[2]):
            return None
        return "".join(kind for dim, kind in enumerate(kinds) if dim not in gone)
    if name == "__getitem__":
        return _indexed(kinds, args[1])
    return None


def _compared(kinds: str, other: Any, result: Tensor) -> str | None:
    """`ids == number`, or `ids[..., None] == numbers`."""
    if not isinstance(other, Tensor) or other.numel() == 1:
        return kinds if result.ndim == len(kinds) else None
    return kinds[:-1] + "e" if other.ndim == 1 and kinds[-1:] == "1" and result.ndim == len(kinds) else None


def _indexed(kinds: str, key: Any) -> str | None:
    """What an index of numbers, slices and new dims leaves. A part of a token's choices are still different."""
    left, made = list(kinds), ""
    for part in _full(kinds, key):
        if part is None:
            made += "1"
            continue
        kind = left.pop(0)
        if isinstance(part, slice):
            if kind not in "j1" and part != slice(None):
                return None
            made += kind
        elif isinstance(part, Tensor) and part.ndim:
            if part.numel() != 1 or part.is_floating_point() or part.element_size() == 1 or kind != "e":
                return None
            made += "1" * part.ndim
        elif kind not in "ej1":
            return None
    return made + "".join(left)


def _full(kinds: str, key: Any) -> list[Any]:
    """The parts of an index, of which none stands for several dims."""
    parts = list(key) if isinstance(key, tuple) else [key]
    used = sum(1 for part in parts if part is not None and part is not Ellipsis)
    if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[place : place + 1] = [slice(None)] * (len(kinds) - used)
    return parts


def moved(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], rank: int) -> list[int] | None:
    """The order of the dims in the result of a function that moves them; None where it is not known."""
    order = list(range(rank))
    if name in ("t", "T"):
        return order[::-1] if rank <= 2 else None
    if name == "mT":
        return [*order[:-2], order[-1], order[-2]]
    dims = args[1:] if len(args) != 2 or not isinstance(args[1], (tuple, list)) else args[1]
    if kwargs or not all(isinstance(dim, int) for dim in dims):
        return None
    if name == "permute":
        return [dim % rank for dim in dims]
    if len(dims) != 2 or not rank:
        return None
    first, second = (dim % rank for dim in dims)
    if name == "movedim":
        order.insert(second, order.pop(first))
    else:
        order[first], order[second] = second, first
    return order


def _viewed(kinds: str, before: tuple[int, ...], after: tuple[int, ...]) -> str | None:
    """The kinds of the dims of a view, in which tokens may have other dims."""
    made, left = "", [(kind, size) for kind, size in zip(kinds, before, strict=True) if size != 1]
    for size in after:
        if size == 1:
            made += "1"
            continue
        if not left:
            return None
        kind, wide = left.pop(0)
        while wide < size and left and left[0][0] == kind == "t":
            wide *= left.pop(0)[1]
        if wide != size:
            if kind != "t" or wide % size:
                return None
            left.insert(0, (kind, wide // size))
        made += kind
    return made if not left else None


def tokens_of(kinds: str, shape: tuple[int, ...]) -> int:
    """How many tokens a tensor has."""
    return math.prod(size for kind, size in zip(kinds, shape, strict=True) if kind == "t")
