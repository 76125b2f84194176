"""Selections of rows while a model is traced: what a mask selects, and how selected rows are read and written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from shardc.capture.experts.choices import Choices, origin
from shardc.capture.experts.counts import Chooser, Counts, Emptiness, Subject, Truth, unknown
from shardc.capture.experts.empty_cases import FIRST_TRACE, EmptyCase
from shardc.capture.torch_patches.attention.notes import Notes
from shardc.capture.torch_patches.traced_nodes import node_of


@dataclass(frozen=True)
class Selection:
    """The tokens for which `valid`, a flat mask, is true; their dims have `sizes`. `chosen` [tokens, k] is there where
    they are those that have chosen something: it says by which choice, of which there is one at most. `segment` is
    there where they are the rows of one expert, of rows in the order of experts."""

    valid: Tensor
    sizes: tuple[int, ...]
    subject: Subject
    chosen: Tensor | None = None
    segment: tuple[Any, int] | None = None


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


class Selections:
    """What is selected in one trace, which is told what is empty."""

    def __init__(self, case: EmptyCase = FIRST_TRACE) -> None:
        self.empty = Emptiness(case)
        self._notes = Notes()
        self.masks = dict[fx.Node, Subject]()
        """What selects rows, and what such questions are about."""
        self._any = False

    def forget(self) -> None:
        """Let go of all tensors."""
        self._notes, self._any = Notes(), False

    def refuse(self, tensor: Any) -> None:
        """Raise for selected rows that leave the model."""
        if self._selected(tensor):
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise unknown(self.empty.selected if self._any else None)

    def _selected(self, tensor: Any) -> bool:
        return self._notes.get(tensor, Rows) is not None or self._notes.get(tensor, Picked) is not None

    def _dim(self, tensor: Any) -> int | None:
        rows = self._notes.get(tensor, Rows)
        return rows.dim if rows is not None else 0 if self._notes.get(tensor, Picked) is not None else None

    def _selection(self, mask: Tensor) -> Selection:
        """What a mask selects. Masks with the same elements in the same order are one."""
        choices = self._notes.get(mask, Choices)
        kinds = _kinds(choices, mask)
        root = origin(self._notes, mask)
        known = self._notes.get(root, Selection)
        paired = "j" in kinds
        sizes = tuple(size for size, kind in zip(mask.shape, kinds, strict=True) if kind != "j")
        if known is not None and paired == (known.chosen is not None):
            return Selection(known.valid, sizes, known.subject, known.chosen)
        subject = frozenset[tuple[Chooser, int]]().union(*self._subjects(mask))
        mask = mask if mask.dtype is torch.bool else mask != 0
        chosen = mask.movedim(kinds.index("j"), -1).flatten(0, -2) if paired else None
        made = Selection(mask.flatten() if chosen is None else chosen.any(-1), sizes, subject, chosen)
        self._notes.put(root, made)
        self._any = True
        self.empty.selected = self.empty.place()
        self._note_mask(made.valid, subject)
        return made

    def _subjects(self, mask: Tensor) -> list[Subject]:
        """What a mask selects: for each expert, if it has a dim of experts."""
        choices = self._notes.get(mask, Choices)
        known = None if choices is None else choices.subjects(tuple(mask.shape))
        if known is not None:
            return known
        root = origin(self._notes, mask)
        chooser = self._notes.get(root, Chooser)
        if chooser is None:
            chooser = Chooser()
            self._notes.put(root, chooser)
        return chooser.experts(1)

    def _note_mask(self, mask: Tensor, subject: Subject) -> None:
        node = node_of(mask)
        if node is not None:
            self.masks[node] = subject

    def _picked(self, mask: Tensor, apart: bool) -> tuple[Any] | None:
        if mask.ndim == 0 or self._selected(mask):
            return None
        truth = self._notes.get(mask, Truth)
        if truth is not None and mask.ndim == 1 and not apart and truth.value:
            numbers = torch.arange(mask.shape[0], device=mask.device).unsqueeze(1)
            left = [place for place, subject in enumerate(truth.subjects) if not self.empty.none(subject)]
            numbers = numbers if len(left) == mask.shape[0] else numbers[left]
            self._notes.put(numbers, Counts(tuple(left)))
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
        of, dim, index, *_ = args
        return (*[slice(None)] * (dim % of.ndim), index) if isinstance(dim, int) and of.ndim else None

    def _place(self, key: Any, rank: int) -> tuple[Selection, int, list[Any], bool]:
        """What an index selects, the first dim where it does, what else it says of the dims from there on, and whether
        it asks for the number of the choice as well. New dims before it come first."""
        parts = list(key) if isinstance(key, (tuple, list)) else [key]
        plain = [part for part in parts if not isinstance(part, Tensor)]
        if Ellipsis in plain:
            at = next(i for i, part in enumerate(parts) if part is Ellipsis)
            used = sum(
                part.ndim if is_mask(part) and part.dtype is torch.bool else 1
                for part in parts
                if part is not None and part is not Ellipsis
            )
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
        if not self._selected(value) and not any(self._notes.get(k, Picked) for k in tensors_of(key)):
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

    def _written(self, base: Tensor, selection: Selection, dim: int, value: Any, adds: bool, apart: bool) -> tuple[Any]:
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


def _kinds(choices: Choices | None, mask: Tensor) -> str:
    """The kinds of the dims of a mask: tokens, and the choices of each if it is true for one of them at most."""
    kinds = "" if choices is None else choices.kinds.replace("1", "t")
    return kinds if kinds and set(kinds) <= {"t", "j"} and kinds.count("j") < 2 else "t" * mask.ndim


def is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_floating_point() and not x.is_complex()


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_of(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_of(one)
