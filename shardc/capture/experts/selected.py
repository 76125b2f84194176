"""Rows that a mask selects, while a model is traced: how many there are only a run knows.

    rows, _ = torch.where(ids == 3)             all rows stand in the trace, with a note of which are selected;
    y = self.experts[3](x[rows])                functions that work by row are traced for all of them,
    out.index_add_(0, rows, y)             ->   out + where(mask, y, 0)

What asks for more, such as their number or their sum, is refused as it was. An empty selection is asked for so often
that it has an answer: no. Capture traces the model again with the other answer, to see that nothing else hangs on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shardc.capture.experts.by_row import by_row
from shardc.capture.experts.choices import Choices, note_choices
from shardc.capture.experts.counts import Count, Counts, Subject, Truth
from shardc.capture.experts.segments import SegmentedRows
from shardc.capture.experts.selections import Picked, Rows, is_mask, tensors_of

Run = Callable[[], Any]


class SelectedRows(SegmentedRows):
    """Calls functions of torch in a trace, and follows what they select."""

    def call(self, run: Run, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`run()`, a call of the function called `name`, or what it gives for all rows."""
        known = self._known(run, name, args, kwargs)
        if known is not None:
            return known[0]
        given = self._given(args, kwargs) if self._any else {}
        if self._any and name not in _SHAPED and _counts((args, kwargs)):
            self._refuse()
        result = run()
        if given:
            self._follow(name, args, kwargs, result, given)
        else:
            note_choices(self._notes, name, args, kwargs, result)
            self._note_counts(name, args, kwargs, result)
            self.follow_bounds(name, args, kwargs, result)
        return result

    def read(self, name: str, tensor: Any, value: Any) -> Any:
        """The value of an attribute of a tensor."""
        if not self._any or not isinstance(tensor, Tensor):
            return value
        if isinstance(value, Tensor):
            given = self._given((tensor,), {})
            if given:
                self._follow(name, (tensor,), {}, value, given)
            else:
                note_choices(self._notes, name, (tensor,), {}, value)
        elif name == "shape" and (dim := self._dim(tensor)) is not None:
            return torch.Size([self._count(tensor, n) if place == dim else n for place, n in enumerate(value)])
        return value

    def listed(self, tensor: Tensor) -> tuple[list[Any]] | None:
        """The numbers of a tensor that counts what was selected."""
        bounds = self.listed_bounds(tensor)
        if bounds is not None:
            return (bounds,)
        truth = self._notes.get(tensor, Truth)
        if truth is None or truth.value is not None or tensor.ndim != 1:
            return None
        return ([Count(1, self.empty, one) for one in truth.subjects],)

    def _count(self, tensor: Tensor, number: int) -> Count:
        """How many selected rows a tensor has."""
        rows = self._notes.get(tensor, Rows) or self._notes.get(tensor, Picked)
        assert rows is not None
        return Count(number, self.empty, rows.selection.subject)

    def _known(self, run: Run, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any] | None:
        """The result of a call that selects rows, reads or writes them, or asks about them; None for other calls."""
        first: Any = next(iter(args), None)
        if name in ("where", "nonzero") and not args[1:] and is_mask(first):
            return self._picked(first, name == "where" or kwargs.get("as_tuple", False))
        segmented = self.of_segments(name, args, kwargs)
        if segmented is not None:
            return segmented
        if name in _ASKS and isinstance(first, Tensor):
            return self._asked(name, first, args)
        if name in ("bincount", "histc"):
            return (self._binned if name == "bincount" else self._histogram)(first, args, kwargs)
        if name == "__getitem__" and (number := self._one(args[1])) is not None:
            return self._numbered(args, number)
        args = _in_order(name, args, kwargs)
        if name in ("__getitem__", "index_select"):
            key = args[1] if name == "__getitem__" else self._along(args)
            return self._taken(first, key) if self._selects(key) and not self._selected(first) else None
        if name in ("__setitem__", "index_put_", "index_put"):
            return self._put(name, args, kwargs) if self._selects(args[1]) else None
        if name in ("index_add_", "index_add", "index_copy_", "index_copy") and self._selects(args[2:3]):
            return self._added(name, args, kwargs)
        return None

    def _given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int, Rows | Picked]:
        """What is noted of the arguments of a call, by identity: a call that writes into one ends its note."""
        found = {
            id(one): self._notes.get(one, Rows) or self._notes.get(one, Picked) for one in tensors_of((args, kwargs))
        }
        return {key: note for key, note in found.items() if note is not None}

    def _follow(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, given: dict[int, Rows | Picked]
    ) -> None:
        """Note where selected rows are in what was made of them. Raises for what mixes them."""
        rows, *more = given.values()
        if isinstance(rows, Picked) and name in _OF_INDICES and not more:
            self._notes.put(result, rows)
            return
        if any(isinstance(one, Picked) or one.selection.valid is not rows.selection.valid for one in (rows, *more)):
            self._refuse()
        dims = {key: one.dim for key, one in given.items()}

        def dim_of(one: Any) -> int | None:
            return dims.get(id(one))

        dim = by_row(name, args, kwargs, dim_of, result)
        if dim is None:
            self._refuse()
        for one in tensors_of(result):
            self._notes.put(one, Rows(rows.selection, dim))

    def _binned(self, ids: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any] | None:
        """How often each expert was chosen."""
        given = dict(zip(("weights", "minlength"), args[1:], strict=False)) | dict(kwargs)
        counts = None if given.get("weights") is not None else self.counted(ids, given.get("minlength", 0))
        return None if counts is None else (self._counting(counts, ids),)

    def _histogram(self, ids: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any] | None:
        """The same, in numbers of the type of the ids: `bins` of one number each."""
        given = dict(zip(("bins", "min", "max"), args[1:], strict=False)) | dict(kwargs)
        bins = given.get("bins", 100)
        whole = given.get("min", 0) == 0 and given.get("max", 0) in (bins, bins - 1)
        counts = self.counted(ids, bins) if whole else None
        if counts is None:
            return None
        made = counts.to(ids.dtype)
        self.follow_bounds("to", (counts,), {}, made)
        return (self._counting(made, ids),)

    def _counting(self, counts: Tensor, ids: Tensor) -> Tensor:
        choices = self._notes.get(ids, Choices)
        assert choices is not None
        self._notes.put(counts, Truth(None, tuple(choices.chooser.experts(counts.shape[0]))))
        return counts

    def _note_counts(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note of a result that it counts what a mask selects, or says whether it selects anything."""
        if not isinstance(result, Tensor) or not args or not isinstance(args[0], Tensor):
            return
        first, counts = args[0], self._notes.get(args[0], Truth)
        choice = self._notes.get(first, Choices)
        if name in ("any", "sum", "count_nonzero") and (first.dtype is torch.bool or (choice and "e" in choice.kinds)):
            subjects, together = self._subjects(first), frozenset(one for each in self._subjects(first) for one in each)
            whole = len(args) == 1 and not kwargs
            if whole or (result.shape == first.shape[:1] and choice is not None and choice.kinds[:1] == "e"):
                self._notes.put(result, Truth(name == "any" or None, (together,) if whole else tuple(subjects)))
                self._note_mask(first, together)
        elif counts is not None and name in _COMPARED and counts.value is None and len(args) > 1:
            said = _COMPARED[name]
            if args[1] == said[0]:
                self._notes.put(result, Truth(said[1], counts.subjects))
        elif counts is not None and name in ("__getitem__", "cpu", "to", "bool", "unbind", "squeeze", "item"):
            subjects = counts.subjects
            if name == "__getitem__":
                subjects = _elements(subjects, *args[1:]) if first.ndim else ()
            value = counts.value if name != "bool" else True
            self._notes.put(result, Truth(value, subjects) if subjects else None)

    def _asked(self, name: str, tensor: Tensor, args: tuple[Any, ...]) -> tuple[Any] | None:
        """The answer to a question about selections; None for other questions."""
        dim = self._dim(tensor)
        if dim is not None:
            sizes = [self._count(tensor, n) if place == dim else n for place, n in enumerate(tensor.shape)]
            if name == "size":
                return (sizes[args[1]],) if len(args) > 1 else (torch.Size(sizes),)
            if name == "numel":
                return (self._count(tensor, tensor.numel()),)
            self._refuse()
        numbers = self._notes.get(tensor, Counts)
        if numbers is not None:
            return self._number(name, tensor, numbers)
        truth = self._notes.get(tensor, Truth)
        if truth is None or len(truth.subjects) != 1 or name not in ("__bool__", "item", "__int__"):
            return None
        if name == "__bool__" or (name == "item" and truth.value is not None):
            return ((truth.value is not False) != self.empty.none(*truth.subjects),)
        return (Count(1, self.empty, *truth.subjects),) if name == "item" else None

    def _one(self, key: Any) -> int | None:
        """The number of an expert, where an index is that."""
        numbers = self._notes.get(key, Counts)
        return numbers.numbers[0] if numbers is not None and key.numel() == 1 else None

    def _numbered(self, args: tuple[Any, ...], number: int) -> tuple[Any]:
        """`x[number]`, of a tensor that has the number."""
        key = slice(number, number + 1) if args[1].ndim else number
        made = args[0][key]
        note_choices(self._notes, "__getitem__", (args[0], args[1]), {}, made)
        return (made,)

    def _number(self, name: str, tensor: Tensor, numbers: Counts) -> tuple[Any] | None:
        """Of the experts that something has chosen, one by one."""
        if name == "unbind":
            each: list[Tensor] = []
            for place, number in enumerate(numbers.numbers):
                one = tensor[place]
                self._notes.put(one, Counts((number,)))
                each.append(one)
            return (tuple(each),)
        if len(numbers.numbers) == 1 and name in ("item", "__index__", "__int__"):
            return (numbers.numbers[0],)
        return None


_OF_INDICES = ("to", "long", "int", "squeeze", "flatten", "view", "reshape", "contiguous", "clone")
_ASKS = ("__bool__", "item", "__int__", "__index__", "unbind", "size", "numel", "__len__")
_COMPARED: Mapping[str, tuple[int, bool]] = {
    **dict.fromkeys(("gt", "__gt__", "greater", "ne", "__ne__", "not_equal"), (0, True)),
    **dict.fromkeys(("eq", "__eq__"), (0, False)),
    **dict.fromkeys(("ge", "__ge__"), (1, True)),
    **dict.fromkeys(("lt", "__lt__"), (1, False)),
}


_SHAPED = ("view", "reshape", "expand", "unflatten")
"""What may be told how many rows there are."""


def _counts(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_counts, value))
    return isinstance(value, Count) or (isinstance(value, dict) and any(map(_counts, value.values())))


def _elements(subjects: tuple[Subject, ...], key: Any) -> tuple[Subject, ...]:
    """What the elements are about that an index leaves; none where it is no number, and no slice."""
    if isinstance(key, slice):
        return subjects[key]
    return (subjects[key],) if isinstance(key, int) and not isinstance(key, bool) else ()


_INDEXED = ("input", "dim", "index", "source")
_PARAMETERS = {
    "index_select": _INDEXED[:3],
    **dict.fromkeys(("index_add", "index_add_", "index_copy", "index_copy_"), _INDEXED),
    **dict.fromkeys(("index_put", "index_put_"), ("input", "indices", "values")),
}


def _in_order(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call that indexes, whether by place or by name."""
    return *args, *(kwargs[one] for one in _PARAMETERS.get(name, ())[len(args) :] if one in kwargs)
