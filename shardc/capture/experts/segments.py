"""Rows in the order of their experts, while a model is traced: how many each expert has only a run knows.

    counts = torch.bincount(ids.flatten(), minlength=8)
    parts = rows.split(counts.tolist())             part e: all rows, with a note that those of expert e are meant
    out = torch.cat([f(p) for f, p in ...])   ->    where(e == 0, f0(rows), 0) + where(e == 1, f1(rows), 0) + ...

where `e` is the expert of each row: as many ends of segments lie before it. Sums and differences of counts are followed
as sets of experts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardc.capture.experts.choices import Choices
from shardc.capture.experts.counts import Chooser, SegmentBound, Subject
from shardc.capture.experts.empty_cases import FIRST_TRACE, EmptyCase
from shardc.capture.experts.selections import Rows, Selection, Selections
from shardc.capture.torch_patches.module_internals import version

Experts = frozenset[int]


@dataclass(frozen=True, eq=False)
class Segments:
    """There are `counts[e]` rows of expert e, and `total` in all. What `chooser` chooses is sorted."""

    counts: Tensor
    total: int
    chooser: Chooser

    @property
    def experts(self) -> int:
        return self.counts.shape[0]

    @property
    def subjects(self) -> list[Subject]:
        return self.chooser.experts(self.experts)


@dataclass(frozen=True)
class Bounds:
    """Each element says how many rows some experts have together."""

    segments: Segments
    experts: tuple[Experts, ...]


@dataclass(frozen=True)
class Zeros:
    """All elements are zero."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """The tensor says how bounds compare."""

    compare: Callable[[Any, Any], bool]
    bounds: tuple[Any, Any]


_ZEROS = ("zeros", "new_zeros", "zeros_like")
_COPIES = ("to", "cpu", "int", "long", "float", "double", "clone", "detach", "contiguous", "type")
_ASKS = ("item", "numpy", "unbind")
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    name: getattr(operator, kind)
    for kind in ("eq", "ne", "lt", "le", "gt", "ge")
    for name in (kind, f"__{kind}__", {"eq": "equal", "ne": "not_equal", "lt": "less", "gt": "greater"}.get(kind, kind))
}
_JOINS = ("cat", "concat", "concatenate")


class SegmentedRows(Selections):
    """Follows counts, and what is cut and joined by them."""

    def __init__(self, case: EmptyCase = FIRST_TRACE) -> None:
        super().__init__(case)
        self._numbers: dict[Segments, Tensor] = {}
        self._cut: dict[tuple[Segments, int], Selection] = {}
        self._zero_before: dict[int, bool] = {}
        """Whether a tensor that is being written was all zeros."""
        self._parts: list[tuple[Tensor, int]] = []
        """What was cut of other tensors, and how often each was written before."""

    def forget(self) -> None:
        super().forget()
        self._numbers.clear()
        self._cut.clear()
        self._parts.clear()

    def refuse_written(self) -> None:
        """Raise where code has written into a segment, and so into the rows of which the trace has cut a copy."""
        if any(version(part) != before for part, before in self._parts):
            self._refuse()

    def listed_bounds(self, tensor: Tensor) -> list[Any] | None:
        """The elements of a tensor of bounds."""
        bounds = self._notes.get(tensor, Bounds)
        return None if bounds is None or tensor.ndim != 1 else self._bounds_in(bounds)

    def _bounds_in(self, bounds: Bounds) -> list[SegmentBound]:
        self._any = True
        self.empty.lists()
        of = bounds.segments
        # in each case another number, so that a trace differs where C code, such as that of `range`, has read it
        shown = of.total + self.empty.case.number
        return [SegmentBound(shown, self.empty, of, experts) for experts in bounds.experts]

    def of_segments(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any] | None:
        """The result of a call that cuts rows into segments, joins them, or asks for bounds; None for other calls."""
        first: Any = next(iter(args), None)
        if name == "scatter_":
            self._zero_before[id(first)] = self._notes.get(first, Zeros) is not None
        if name in ("item", "__bool__") and (asked := self._notes.get(first, Comparison)) is not None:
            return (asked.compare(*asked.bounds),)
        if name in _ASKS and isinstance(first, Tensor):
            bounds = self._notes.get(first, Bounds)
            return None if bounds is None else self._answered(name, first, bounds)
        if name in ("__getitem__", "__setitem__"):
            start, stop, rest = self._slice(args[1])
        elif name == "narrow" and len(args) == 4 and args[1] == 0:
            start, stop, rest = args[2], self._added_up(args[2], args[3]), ()
        elif name in ("split", "split_with_sizes") and len(args) > 1:
            return self._split(first, args[1], kwargs.get("dim", args[2] if len(args) > 2 else 0))
        elif name in _JOINS and isinstance(first, (list, tuple)):
            return self._joined(first, kwargs.get("dim", args[1] if len(args) > 1 else 0))
        else:
            return None
        cut = self._segment(start, stop)
        if cut is None or not isinstance(first, Tensor):
            return None
        if self._selected(first) or first.shape[0] != cut[0].total or any(one != slice(None) for one in rest):
            self._refuse()
        if name == "__setitem__":
            self._written(first, self._selection_of(*cut), 0, args[2], False, False)
            return (None,)
        return (self._part(first, *cut),)

    def _answered(self, name: str, tensor: Tensor, bounds: Bounds) -> tuple[Any] | None:
        if name == "unbind":
            parts = [tensor[place] for place in range(tensor.shape[0])]
            for part, experts in zip(parts, bounds.experts, strict=True):
                self._notes.put(part, Bounds(bounds.segments, (experts,)))
            return (tuple(parts),)
        known = self._bounds_in(bounds)
        if name == "numpy":
            return (np.array(known, dtype=object),)
        return (known[0],) if len(known) == 1 else None

    def _slice(self, key: Any) -> tuple[Any, Any, tuple[Any, ...]]:
        parts = key if isinstance(key, tuple) else (key,)
        part = parts[0] if parts else None
        if not isinstance(part, slice) or part.step is not None:
            return None, None, ()
        return self._number_of(part.start), self._number_of(part.stop), tuple(parts[1:])

    def _number_of(self, bound: Any) -> Any:
        known = self._notes.get(bound, Bounds)
        return bound if known is None or len(known.experts) != 1 else self._bounds_in(known)[0]

    def _added_up(self, start: Any, length: Any) -> Any:
        start, length = self._number_of(start), self._number_of(length)
        return start + length if isinstance(length, SegmentBound) else None

    def _segment(self, start: Any, stop: Any) -> tuple[Segments, int] | None:
        """The segment between two bounds; None where they are no bounds. Raises where it is not that of one expert."""
        known = [one for one in (start, stop) if isinstance(one, SegmentBound)]
        if not known:
            return None
        segments: Segments = known[0].segments
        whole = frozenset(range(segments.experts))
        before = start.experts if isinstance(start, SegmentBound) else frozenset[int]() if start in (0, None) else None
        after = stop.experts if isinstance(stop, SegmentBound) else whole if stop in (None, segments.total) else None
        if before is None or after is None or any(one.segments is not segments for one in known):
            self._refuse()
        none = self.empty.empties(segments.subjects)
        between = (after - before) - none if len(after - before) > 1 else after - before
        if len(between) != 1:
            self._refuse()
        (expert,) = between
        below = frozenset(range(expert))
        if not (before <= below <= before | none and after - {expert} <= below):
            self._refuse()
        return segments, expert

    def _split(self, x: Any, sizes: Any, dim: int) -> tuple[Any] | None:
        bounds = self._notes.get(sizes, Bounds)
        given = self._bounds_in(bounds) if bounds is not None else sizes
        if not isinstance(given, (list, tuple)) or not any(isinstance(one, SegmentBound) for one in given):
            return None
        wanted = [frozenset({expert}) for expert in range(len(given))]
        first: Any = given[0]
        if [getattr(one, "experts", None) for one in given] != wanted or dim % x.ndim or self._selected(x):
            self._refuse()
        if any(one.segments is not first.segments for one in given) or x.shape[0] != first.segments.total:
            self._refuse()
        return (tuple(self._part(x, first.segments, expert) for expert in range(len(given))),)

    def _part(self, x: Tensor, segments: Segments, expert: int) -> Tensor:
        made = x.clone()
        self._notes.put(made, Rows(self._selection_of(segments, expert), 0))
        if not made.is_inference():
            self._parts.append((made, version(made)))
        return made

    def _selection_of(self, segments: Segments, expert: int) -> Selection:
        key = segments, expert
        if key not in self._cut:
            valid = self._expert_of_rows(segments) == expert
            self._cut[key] = Selection(valid, (segments.total,), segments.subjects[expert], segment=key)
            self._note_mask(self._cut[key].valid, segments.subjects[expert])
        return self._cut[key]

    def _expert_of_rows(self, segments: Segments) -> Tensor:
        if segments not in self._numbers:
            ends = segments.counts.long().cumsum(0)
            places = torch.arange(segments.total, device=ends.device)
            self._numbers[segments] = (places.unsqueeze(1) >= ends).sum(1)
        return self._numbers[segments]

    def _joined(self, parts: Any, dim: Any) -> tuple[Any] | None:
        """Segments one after the other: every row as the network of its expert made it."""
        rows = [self._notes.get(part, Rows) for part in parts]
        cuts = [one.selection.segment for one in rows if one is not None and one.selection.segment is not None]
        along = [one is not None and one.dim == dim % part.ndim for one, part in zip(rows, parts, strict=True)]
        if not cuts or len(cuts) != len(parts) or not all(along):
            return None
        segments, experts = cuts[0][0], [expert for _, expert in cuts]
        left = set(range(segments.experts)) - set(experts)
        if any(one is not segments for one, _ in cuts) or experts != sorted(set(experts)):
            self._refuse()
        if left - self.empty.empties(segments.subjects):
            self._refuse()
        total: Tensor | None = None
        for part, row in zip(parts, rows, strict=True):
            assert row is not None
            where = row.selection.valid.reshape(-1, *[1] * (part.ndim - row.dim - 1))
            made = torch.where(where, part, torch.zeros((), dtype=part.dtype, device=part.device))
            total = made if total is None else total + made
        return (total,)

    def counted(self, ids: Tensor, count: int) -> Tensor | None:
        """How often each of `count` experts was chosen; None where there may be other numbers among the ids."""
        choices = self._notes.get(ids, Choices)
        if choices is None or ids.ndim != 1 or not count:
            return None
        counts = (ids.long().unsqueeze(-1) == torch.arange(count, device=ids.device)).sum(0)
        if 0 < choices.among <= count:
            self.note_bounds(counts, choices)
        return counts

    def note_bounds(self, counts: Tensor, choices: Choices) -> None:
        each = tuple(frozenset({expert}) for expert in range(counts.shape[0]))
        self._notes.put(counts, Bounds(Segments(counts, choices.total, choices.chooser), each))

    def follow_bounds(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note of a result what it says of the rows of experts."""
        if not isinstance(result, Tensor):
            return
        first: Any = next(iter(args), None)
        if name in _ZEROS:
            self._notes.put(result, Zeros())
        elif name in ("scatter", "scatter_"):
            self._notes.put(result, self._scattered(args))
        elif name == "sum":
            choices = self._notes.get(first, Choices)
            if choices is not None and _sums_all_but_experts(choices, first, args[1:], kwargs, result):
                self.note_bounds(result, choices)
        elif name in _COMPARE and result.ndim == 0 and len(args) > 1:
            pair = self._number_of(first), self._number_of(args[1])
            bounds = [one for one in pair if isinstance(one, SegmentBound)]
            if bounds and not any(isinstance(one, Tensor) for one in pair):
                self._notes.put(result, Comparison(_COMPARE[name], pair))
        elif result.ndim < 2 and name in _FOLLOWED:
            self._notes.put(result, _FOLLOWED[name](self._known_bounds, args, kwargs))

    def _known_bounds(self, x: Any) -> Bounds | bool:
        """What is known of a tensor; False where it is all zeros, True where nothing is known."""
        known = self._notes.get(x, Bounds)
        return known if known is not None else self._notes.get(x, Zeros) is None

    def _scattered(self, args: tuple[Any, ...]) -> Choices | None:
        """Ones at the experts that a token has chosen."""
        if len(args) != 4:
            return None
        zeros, dim, ids, value = args
        choices = self._notes.get(ids, Choices)
        known = self._zero_before.pop(id(zeros), False) or self._notes.get(zeros, Zeros) is not None
        if choices is None or isinstance(value, Tensor) or value != 1:
            return None
        last = dim % zeros.ndim == zeros.ndim - 1 and zeros.shape[:-1] == ids.shape[:-1]
        alone = set(choices.kinds[:-1]) <= {"t"} and choices.kinds[-1:] == "j"
        if not (last and alone and known):
            return None
        return replace(choices, kinds=choices.kinds[:-1] + "e")


def _sums_all_but_experts(
    choices: Choices, mask: Tensor, rest: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> bool:
    dims = kwargs.get("dim", rest[0] if rest else None)
    if dims is None or isinstance(dims, bool) or result.ndim != 1 or not choices.total or choices.kinds.count("e") != 1:
        return False
    gone = {dim % mask.ndim for dim in (dims if isinstance(dims, (tuple, list)) else [dims])}
    others = {dim for dim, kind in enumerate(choices.kinds) if kind != "e"}
    return gone == others and 0 < choices.among <= result.shape[0]


Known = Callable[[Any], Bounds | bool]


def _same(known: Known, args: tuple[Any, ...], _: Mapping[str, Any]) -> Bounds | None:
    return _of(known(args[0]))


def _of(found: Bounds | bool) -> Bounds | None:
    return found if isinstance(found, Bounds) else None


def _summed(known: Known, args: tuple[Any, ...], _: Mapping[str, Any]) -> Bounds | None:
    """`counts.cumsum(0)`"""
    bounds = _of(known(args[0]))
    if bounds is None or sum(map(len, bounds.experts)) != len(frozenset[int]().union(*bounds.experts)):
        return None
    made = (frozenset[int]().union(*bounds.experts[: place + 1]) for place in range(len(bounds.experts)))
    return Bounds(bounds.segments, tuple(made))


def _element(known: Known, args: tuple[Any, ...], _: Mapping[str, Any]) -> Bounds | None:
    bounds, key = _of(known(args[0])), args[1]
    if bounds is None or args[0].ndim != 1 or not isinstance(key, (int, slice)) or isinstance(key, bool):
        return None
    found = bounds.experts[key]
    return Bounds(bounds.segments, found if isinstance(key, slice) else (found,))  # type: ignore[arg-type]


def _padded(known: Known, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Bounds | None:
    """`F.pad(ends, (1, 0))`"""
    bounds, given = _of(known(args[0])), dict(zip(("mode", "value"), args[2:], strict=False)) | dict(kwargs)
    plain = given.get("mode", "constant") == "constant" and not given.get("value")
    if bounds is None or not plain or len(args) < 2 or tuple(args[1]) != (1, 0):
        return None
    return Bounds(bounds.segments, (frozenset(), *bounds.experts))


def _after_zero(known: Known, args: tuple[Any, ...], _: Mapping[str, Any]) -> Bounds | None:
    """`torch.cat([zero, ends])`"""
    parts = [known(one) for one in args[0]]
    if len(parts) != 2 or parts[0] is not False or not isinstance(parts[1], Bounds) or args[0][0].shape != (1,):
        return None
    return Bounds(parts[1].segments, (frozenset(), *parts[1].experts))


def _difference(known: Known, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Bounds | None:
    """`ends - counts`"""
    first, second = (_of(known(one)) for one in args[:2])
    if first is None or second is None or kwargs or first.segments is not second.segments:
        return None
    if len(first.experts) != len(second.experts):
        return None
    pairs = list(zip(first.experts, second.experts, strict=True))
    return Bounds(first.segments, tuple(a - b for a, b in pairs)) if all(a >= b for a, b in pairs) else None


_FOLLOWED: Mapping[str, Callable[[Known, tuple[Any, ...], Mapping[str, Any]], Bounds | None]] = {
    **dict.fromkeys(_COPIES, _same),
    "cumsum": _summed,
    "__getitem__": _element,
    "pad": _padded,
    **dict.fromkeys(_JOINS, _after_zero),
    **dict.fromkeys(("sub", "__sub__"), _difference),
}
