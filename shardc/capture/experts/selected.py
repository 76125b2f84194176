"""Rows that a mask selects, while a model is traced: how many there are only a run knows.

    rows, _ = torch.where(ids == 3)             all rows stand in the trace, with a note of which are selected;
    y = self.experts[3](x[rows])                functions that work by row are traced for all of them,
    out.index_add_(0, rows, y)             ->   out + where(mask, y, 0)

What asks for more, such as their number or their sum, is refused as it was. An empty selection is asked for so often
that it has an answer: no. Capture traces the model again with the other answer, to see that nothing else hangs on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from shardc.capture.experts.by_row import by_row
from shardc.capture.experts.choices import Choices, note_choices, origin
from shardc.capture.experts.counts import Count, Counts, Emptiness, Truth, unknown
from shardc.capture.torch_patches.attention.notes import Notes
from shardc.capture.torch_patches.traced_nodes import node_of

Run = Callable[[], Any]


@dataclass(frozen=True)
class Selection:
    """The tokens for which `valid`, a flat mask, is true; their dims have `sizes`. `chosen` [tokens, k] is there where
    they are those that have chosen something: it says by which choice, of which there is one at most."""

    valid: Tensor
    sizes: tuple[int, ...]
    chosen: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """The tensor has all tokens along `dim`, of which only the selected ones mean anything."""

    selection: Selection
    dim: int


@dataclass(frozen=True)
class Picked:
    """The tensor has indices of selected rows: those along a dim of the tokens, or (None) the number of the choice."""

    selection: Selection
    dim: int | None


class SelectedRows:
    """Calls functions of torch in a trace, and follows what they select. With `empty`, all selections are."""

    def __init__(self, empty: bool = False) -> None:
        self.empty = Emptiness(empty)
        self._notes = Notes()
        self.masks = set[fx.Node]()
        """What selects rows, and what such questions are about."""
        self._any = False

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
            return torch.Size([Count(n, self.empty) if place == dim else n for place, n in enumerate(value)])
        return value

    def listed(self, tensor: Tensor) -> tuple[list[Any]] | None:
        """The numbers of a tensor that counts what was selected."""
        truth = self._notes.get(tensor, Truth)
        known = truth is not None and truth.value is None and tensor.ndim == 1
        return ([Count(1, self.empty) for _ in range(tensor.shape[0])],) if known else None

    def forget(self) -> None:
        """Let go of all tensors."""
        self._notes, self._any = Notes(), False

    def refuse(self, tensor: Any) -> None:
        """Raise for selected rows that leave the model."""
        if self._selected(tensor):
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise unknown()

    def _selected(self, tensor: Any) -> bool:
        return self._notes.get(tensor, Rows) is not None or self._notes.get(tensor, Picked) is not None

    def _dim(self, tensor: Any) -> int | None:
        rows = self._notes.get(tensor, Rows)
        return rows.dim if rows is not None else 0 if self._notes.get(tensor, Picked) is not None else None

    def _known(self, run: Run, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any] | None:
        """The result of a call that selects rows, reads or writes them, or asks about them; None for other calls."""
        first = args[0] if args else None
        if name in ("where", "nonzero") and len(args) == 1 and _is_mask(first):
            return self._picked(first, name == "where" or kwargs.get("as_tuple", False))
        if name in _ASKS and isinstance(first, Tensor):
            return self._asked(name, first, args)
        if name == "bincount":
            return self._binned(first, args, kwargs)
        if name == "__getitem__" and (number := self._one(args[1])) is not None:
            return self._numbered(args, number)
        if name in ("__getitem__", "index_select"):
            key = args[1] if name == "__getitem__" else self._along(args)
            return self._taken(first, key) if self._selects(key) and not self._selected(first) else None
        if name in ("__setitem__", "index_put_", "index_put"):
            return self._put(name, args, kwargs) if self._selects(args[1]) else None
        if name in ("index_add_", "index_add", "index_copy_", "index_copy") and self._selects(args[2:3]):
            return self._added(name, args, kwargs)
        return None

    def _selection(self, mask: Tensor) -> Selection:
        """What a mask selects. Masks with the same elements in the same order are one."""
        choices = self._notes.get(mask, Choices)
        kinds = _kinds(choices, mask)
        root = origin(self._notes, mask)
        known = self._notes.get(root, Selection)
        paired = "j" in kinds
        sizes = tuple(size for size, kind in zip(mask.shape, kinds, strict=True) if kind != "j")
        if known is not None and paired == (known.chosen is not None):
            return Selection(known.valid, sizes, known.chosen)
        mask = mask if mask.dtype is torch.bool else mask != 0
        chosen = mask.movedim(kinds.index("j"), -1).flatten(0, -2) if paired else None
        made = Selection(mask.flatten() if chosen is None else chosen.any(-1), sizes, chosen)
        self._notes.put(root, made)
        self._any = True
        self._note_mask(made.valid)
        return made

    def _note_mask(self, mask: Tensor) -> None:
        node = node_of(mask)
        if node is not None:
            self.masks.add(node)

    def _picked(self, mask: Tensor, apart: bool) -> tuple[Any] | None:
        if mask.ndim == 0 or self._selected(mask):
            return None
        truth = self._notes.get(mask, Truth)
        if truth is not None and mask.ndim == 1 and not apart and truth.value:
            numbers = torch.arange(mask.shape[0], device=mask.device).unsqueeze(1)
            empty = bool(self.empty)
            numbers = numbers[:0] if empty else numbers
            self._notes.put(numbers, Counts(tuple(range(numbers.shape[0]))))
            return (numbers,)
        selection = self._selection(mask)
        kinds = _kinds(self._notes.get(mask, Choices), mask)
        grid = torch.arange(selection.valid.shape[0], device=mask.device)
        found: list[Tensor] = []
        place = 0
        for kind in kinds:
            if kind == "j":
                assert selection.chosen is not None
                index, dim = selection.chosen.to(torch.int8).argmax(-1), None
            else:
                after = math.prod(selection.sizes[place + 1 :])
                index, dim = grid // after % selection.sizes[place], place
                place += 1
            self._notes.put(index, Picked(selection, dim))
            found.append(index)
        if apart:
            return (tuple(found),)
        if len(found) > 1:
            return None
        both = found[0].unsqueeze(1)
        self._notes.put(both, Picked(selection, 0))
        return (both,)

    def _selects(self, key: Any) -> bool:
        parts = key if isinstance(key, (tuple, list)) else (key,)
        return any(
            isinstance(part, Tensor) and ((part.dtype is torch.bool and part.ndim > 0) or self._notes.get(part, Picked))
            for part in parts
        )

    def _along(self, args: tuple[Any, ...]) -> Any:
        """The index of `index_select`."""
        return (*[slice(None)] * (args[1] % args[0].ndim), args[2]) if isinstance(args[1], int) else None

    def _place(self, key: Any, rank: int) -> tuple[Selection, int, list[Any], bool]:
        """What an index selects, the first dim where it does, what else it says of the dims from there on, and whether
        it asks for the number of the choice as well. New dims before it come first."""
        parts = list(key) if isinstance(key, (tuple, list)) else [key]
        plain = [part for part in parts if not isinstance(part, Tensor)]
        if Ellipsis in plain:
            at = next(i for i, part in enumerate(parts) if part is Ellipsis)
            used = sum(part.ndim if _is_mask(part) and part.dtype is torch.bool else 1 for part in parts if part is not None and part is not Ellipsis)
            parts[at : at + 1] = [slice(None)] * (rank - used)
        first = next(i for i, part in enumerate(parts) if isinstance(part, Tensor))
        if any(part != slice(None) for part in parts[:first]):
            self._refuse()
        tensor = parts[first]
        if tensor.dtype is torch.bool:
            selection = self._selection(tensor)
            if selection.chosen is not None:
                self._refuse()
            return selection, first, parts[first + 1 :], False
        picked = [self._notes.get(part, Picked) for part in parts[first:] if isinstance(part, Tensor)]
        head = picked[0]
        if head is None or any(one is None or one.selection.valid is not head.selection.valid for one in picked):
            self._refuse()
        wanted: list[int | None] = list(range(len(head.selection.sizes)))
        dims = [one.dim for one in picked if one is not None]
        chooses = dims == [*wanted, None]
        if dims != wanted and not chooses:
            self._refuse()
        rest = [part for part in parts[first:] if not isinstance(part, Tensor)]
        if any(isinstance(part, Tensor) for part in parts[first + len(picked) :]):
            self._refuse()
        return head.selection, first, rest, chooses

    def _taken(self, x: Any, key: Any) -> tuple[Any] | None:
        """`x[key]` for all tokens."""
        if not isinstance(x, Tensor):
            return None
        parts = list(key) if isinstance(key, (tuple, list)) else [key]
        new = 0
        while parts[0] is None:
            new, parts = new + 1, parts[1:]
        selection, dim, rest, chooses = self._place(tuple(parts), x.ndim)
        wide = len(selection.sizes)
        if tuple(x.shape[dim : dim + wide]) != selection.sizes:
            self._refuse()
        flat = x.flatten(dim, dim + wide - 1)
        if chooses:
            assert selection.chosen is not None
            if dim or flat.shape[1] != selection.chosen.shape[1]:
                self._refuse()
            where = selection.chosen.reshape(*selection.chosen.shape, *[1] * (flat.ndim - 2))
            flat = torch.where(where, flat, torch.zeros((), dtype=flat.dtype, device=flat.device)).sum(1)
        elif rest and isinstance(rest[0], int):
            if dim:
                self._refuse()
            flat, rest = flat.select(1, rest[0]), rest[1:]
        made = flat[(*[slice(None)] * (dim + 1), *rest)] if rest else flat
        made = made.clone()
        for _ in range(new):
            made = made.unsqueeze(0)
        self._notes.put(made, Rows(selection, dim + new))
        return (made,)

    def _put(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any] | None:
        base, key, value = args[:3]
        adds = kwargs.get("accumulate", args[3] if len(args) > 3 else False)
        if not self._selected(value) and not any(self._notes.get(k, Picked) for k in _tensors(key)):
            return None  # a mask, and a value that is no selected rows
        selection, dim, rest, chooses = self._place(key, base.ndim)
        if chooses or any(part != slice(None) for part in rest):
            self._refuse()
        return self._written(base, selection, dim, value, adds, name == "index_put")

    def _added(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any] | None:
        base, dim, index, value = args[:4]
        picked = self._notes.get(index, Picked)
        if picked is None or picked.selection.sizes != (base.shape[dim],) or picked.dim != 0:
            self._refuse()
        alpha = kwargs.get("alpha", 1)
        value = value if alpha == 1 else self._scaled(value, alpha)
        return self._written(base, picked.selection, dim % base.ndim, value, "add" in name, not name.endswith("_"))

    def _scaled(self, value: Tensor, alpha: Any) -> Tensor:
        rows = self._notes.get(value, Rows)
        made = value * alpha
        self._notes.put(made, rows)
        return made

    def _written(
        self, base: Tensor, selection: Selection, dim: int, value: Any, adds: bool, apart: bool
    ) -> tuple[Any]:
        wide = len(selection.sizes)
        rows = self._notes.get(value, Rows)
        if tuple(base.shape[dim : dim + wide]) != selection.sizes or self._selected(base):
            self._refuse()
        flat = base.flatten(dim, dim + wide - 1) if wide > 1 else base
        after = flat.ndim - dim
        if isinstance(value, Tensor):
            aligned = rows is not None and rows.selection.valid is selection.valid and value.ndim - rows.dim == after
            if self._selected(value) and not aligned:
                self._refuse()
            if not aligned and value.ndim >= after and value.shape[value.ndim - after] != 1:
                self._refuse()
            value = value.to(flat.dtype)
        else:
            value = torch.full((), value, dtype=flat.dtype, device=flat.device)
        where = selection.valid.reshape(-1, *[1] * (after - 1))
        zero = torch.zeros((), dtype=flat.dtype, device=flat.device)
        made = flat + torch.where(where, value, zero) if adds else torch.where(where, value, flat)
        made = made.reshape(base.shape)
        if apart:
            return (made,)
        base.copy_(made)
        return (base,)

    def _given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int, Rows | Picked]:
        """What is noted of the arguments of a call, by identity: a call that writes into one ends its note."""
        found = {id(one): self._notes.get(one, Rows) or self._notes.get(one, Picked) for one in _tensors((args, kwargs))}
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
        for one in _tensors(result):
            self._notes.put(one, Rows(rows.selection, dim))

    def _binned(self, ids: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any] | None:
        """How often each expert was chosen."""
        given = dict(zip(("weights", "minlength"), args[1:], strict=False)) | dict(kwargs)
        if self._notes.get(ids, Choices) is None or given.get("weights") is not None or not given.get("minlength"):
            return None
        numbers = torch.arange(given["minlength"], device=ids.device)
        counts = (ids.unsqueeze(-1) == numbers).sum(0)
        self._notes.put(counts, Truth(None))
        return (counts,)

    def _note_counts(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note of a result that it counts what a mask selects, or says whether it selects anything."""
        if not isinstance(result, Tensor) or not args or not isinstance(args[0], Tensor):
            return
        first, counts = args[0], self._notes.get(args[0], Truth)
        choice = self._notes.get(first, Choices)
        if name in ("any", "sum", "count_nonzero") and (first.dtype is torch.bool or (choice and "e" in choice.kinds)):
            whole = len(args) == 1 and not kwargs
            if whole or (result.ndim == 1 and choice is not None and choice.kinds[:1] == "e"):
                self._notes.put(result, Truth(name == "any" or None))
                self._note_mask(first)
        elif counts is not None and name in _COMPARED and counts.value is None and len(args) > 1:
            said = _COMPARED[name]
            if args[1] == said[0]:
                self._notes.put(result, Truth(said[1]))
        elif counts is not None and name in ("__getitem__", "cpu", "to", "bool", "unbind", "squeeze", "item"):
            self._notes.put(result, counts if name != "bool" else Truth(True))

    def _asked(self, name: str, tensor: Tensor, args: tuple[Any, ...]) -> tuple[Any] | None:
        """The answer to a question about selections; None for other questions."""
        dim = self._dim(tensor)
        if dim is not None:
            sizes = [Count(n, self.empty) if place == dim else n for place, n in enumerate(tensor.shape)]
            if name == "size":
                return (sizes[args[1]],) if len(args) > 1 else (torch.Size(sizes),)
            if name == "numel":
                return (Count(tensor.numel(), self.empty),)
            self._refuse()
        numbers = self._notes.get(tensor, Counts)
        if numbers is not None:
            return self._number(name, tensor, numbers)
        truth = self._notes.get(tensor, Truth)
        if truth is None or name not in ("__bool__", "item", "__int__"):
            return None
        if name == "__bool__" or (name == "item" and truth.value is not None):
            return ((truth.value is not False) != bool(self.empty),)
        return (Count(1, self.empty),) if name == "item" else None

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


def _kinds(choices: Choices | None, mask: Tensor) -> str:
    """The kinds of the dims of a mask: tokens, and the choices of each if it is true for one of them at most."""
    kinds = "" if choices is None else choices.kinds.replace("1", "t")
    return kinds if kinds and set(kinds) <= {"t", "j"} and kinds.count("j") < 2 else "t" * mask.ndim


_SHAPED = ("view", "reshape", "expand", "unflatten")
"""What may be told how many rows there are."""


def _counts(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_counts, value))
    return isinstance(value, Count) or (isinstance(value, dict) and any(map(_counts, value.values())))


def _is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_floating_point() and not x.is_complex()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
