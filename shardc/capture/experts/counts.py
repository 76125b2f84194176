"""How many rows a mask selects, which only a run knows: whether there are any has an answer, all else has none."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeGuard

import torch

from shardc.capture.experts.empty_cases import ChooserName, EmptyCase, Question, cases
from shardc.capture.torch_patches.fake_tensors import DynamicOutputShapeException
from shardc.capture.trace_errors import explained
from shardc.capture.user_frames import user_frame
from shardc.errors import CaptureError

CodePlace = tuple[str, tuple[str, int] | None]
"""A module, and a file and line."""


@dataclass(eq=False)
class Chooser:
    """What chooses: experts for each token, of which there are `count` if that is known, or rows by a mask."""

    count: int = 0
    _parts: dict[str, Chooser] = field(default_factory=dict[str, "Chooser"])

    def part(self, key: str) -> Chooser:
        """Some of the choices of each token."""
        return self._parts.setdefault(key, Chooser(self.count))

    def experts(self, count: int) -> list[Subject]:
        """Each of the first `count` experts."""
        return [frozenset({(self, expert)}) for expert in range(count)]


Subject = frozenset[tuple[Chooser, int]]
"""Selections that are empty together: what chooses, and the number of an expert."""


@dataclass(frozen=True)
class Truth:
    """The tensor says of selections whether they have rows (True), that they have none (False), or how many (None).
    Each element speaks of one of the `subjects`."""

    value: bool | None
    subjects: tuple[Subject, ...]


@dataclass(frozen=True)
class Counts:
    """The tensor has these numbers, of experts that have rows."""

    numbers: tuple[int, ...]


class Emptiness:
    """Which selections are empty in a trace, and where code asked for it first."""

    def __init__(self, case: EmptyCase) -> None:
        self.case = case
        self._choosers: dict[Chooser, ChooserName] = {}
        self._names = Counter[str]()
        self.questions: dict[Question, None] = {}
        """What code asked, and what it could have asked of the same."""
        self._listed: CodePlace | None = None
        self.path = ""
        """The module that is running."""
        self.selected: CodePlace = "", None
        """Where rows were selected last."""
        self._asked: tuple[Exception, str, tuple[str, int] | None] | None = None

    def none(self, *subjects: Subject) -> bool:
        """The answer to a question: whether all these selections are empty."""
        if self._asked is None:
            self._asked = unknown(), *self.place()
        for subject in subjects:
            for chooser, expert in sorted(subject, key=lambda one: one[1]):
                if chooser not in self._choosers:
                    self._choosers[chooser] = self.path, self._names[self.path]
                    self._names[self.path] += 1
                    self.questions |= {(self._choosers[chooser], number): None for number in range(chooser.count)}
                self.questions[self._choosers[chooser], expert] = None
        return self.said(*subjects)

    def said(self, *subjects: Subject) -> bool:
        """Whether all these are empty in this trace, if code asks."""
        return all(self._in(self.case, one) for one in subjects)

    def _in(self, case: EmptyCase, subject: Subject) -> bool:
        return bool(subject) and all((self._choosers.get(one), expert) in case.empty for one, expert in subject)

    def cases(self) -> list[EmptyCase]:
        """What other traces are to be told."""
        wholes = {name: chooser.count for chooser, name in self._choosers.items() if chooser.count}
        return cases(list(self.questions), wholes) if self.questions else [EmptyCase(1)]

    def shown(self, masks: Collection[tuple[Any, Subject]], case: EmptyCase) -> list[Any]:
        """Those of the masks that are false in another case."""
        return [mask for mask, subject in masks if self._in(case, subject)]

    def lists(self) -> None:
        """Code gets numbers of rows, of rows in the order of experts."""
        self.selected = self.place()
        self._listed = self._listed or self.selected

    @property
    def segmented(self) -> bool:
        """Whether code has got such numbers."""
        return self._listed is not None

    def empties(self, experts: list[Subject]) -> frozenset[int]:
        """The experts that have no segment."""
        return frozenset(number for number, expert in enumerate(experts) if self.said(expert))

    def place(self) -> CodePlace:
        """Where the user's code is."""
        frame = user_frame(sys._getframe(1))
        return self.path, None if frame is None else (frame.f_code.co_filename, frame.f_lineno)

    @property
    def asked(self) -> CaptureError | None:
        """What to raise where code asked for it."""
        return None if self._asked is None else explained(*self._asked)

    @property
    def leaked(self) -> CaptureError | None:
        """What to raise where code does something else with numbers that it got, which C code may have read."""
        return None if self._listed is None else explained(unknown(), *self._listed)


def unknown(selected: CodePlace | None = None) -> Exception:
    """What torch raises for a size that only a run knows; of rows that were `selected` somewhere."""
    error = DynamicOutputShapeException(torch.ops.aten.nonzero.default)
    if selected is not None:
        error.selected = selected  # type: ignore[attr-defined]  # which `explained` reads
    return error


def _refused(*_: Any) -> NoReturn:
    raise unknown()


class Count(int):
    """A number of selected rows. In the trace it is that of all rows, which shapes may have; it may be compared with
    zero; nothing can be computed of it, and nobody can be told it."""

    _empty: Emptiness
    _subject: Subject

    def __new__(cls, value: int, empty: Emptiness, subject: Subject) -> Count:
        made = super().__new__(cls, value)
        made._empty, made._subject = empty, subject
        return made

    def none(self) -> bool:
        """Whether there are no such rows, as the trace is told."""
        return self._empty.none(self._subject)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Count):
            return int.__eq__(self, other)
        return self.none() if other == 0 else _refused()

    def __ne__(self, other: object) -> bool:
        return not self.__eq__(other)

    def __gt__(self, other: int) -> bool:
        return not self.none() if other == 0 else _refused()

    def __ge__(self, other: int) -> bool:
        return not self.none() if other == 1 else _refused()

    def __lt__(self, other: int) -> bool:
        return self.none() if other == 1 else _refused()

    def __le__(self, other: int) -> bool:
        return self.none() if other == 0 else _refused()

    def __bool__(self) -> bool:
        return not self.none()

    __hash__ = int.__hash__
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refused  # type: ignore[assignment]
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __neg__ = __pow__ = __rpow__ = __float__ = _refused  # type: ignore[assignment]
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __lshift__ = __rlshift__ = __rshift__ = _refused  # type: ignore[assignment]
    __rrshift__ = __divmod__ = __rdivmod__ = __invert__ = __abs__ = __pos__ = __int__ = __round__ = _refused  # type: ignore[assignment]
    __trunc__ = __floor__ = __ceil__ = __str__ = __repr__ = __format__ = bit_length = bit_count = _refused  # type: ignore[assignment]

    def leaves(self) -> NoReturn:
        """Raise for a number that leaves the model."""
        raise unknown(self._empty.selected)


class SegmentBound(Count):
    """How many rows some `experts` have together, of the rows of `segments`, which lie in the order of experts.

    Sums and differences of such numbers are such numbers.
    """

    segments: Any
    experts: frozenset[int]

    def __new__(cls, value: int, empty: Emptiness, segments: Any, experts: frozenset[int]) -> SegmentBound:
        made = int.__new__(cls, value)
        made._empty, made.segments, made.experts = empty, segments, experts
        return made

    def none(self) -> bool:
        count = self.segments.experts
        if not self.experts or len(self.experts) == count:
            return not self.experts
        return self._empty.none(*(self.segments.subjects[expert] for expert in sorted(self.experts)))

    def _with(self, experts: frozenset[int]) -> SegmentBound:
        return SegmentBound(int.__int__(self), self._empty, self.segments, experts)

    def _same(self, other: Any) -> TypeGuard[SegmentBound]:
        return isinstance(other, SegmentBound) and other.segments is self.segments

    def __add__(self, other: Any) -> Any:
        if isinstance(other, int) and not isinstance(other, Count) and other == 0:
            return self
        if not self._same(other) or self.experts & other.experts:
            _refused()
        return self._with(self.experts | other.experts)

    __radd__ = __add__  # type: ignore[assignment]

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, int) and not isinstance(other, Count) and other == 0:
            return self
        if not self._same(other) or not self.experts >= other.experts:
            _refused()
        return self._with(self.experts - other.experts)

    def _less(self, other: Any) -> bool:
        """Whether `other`, which counts the same rows and more, is more, as the trace is told."""
        return not (other - self).none()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SegmentBound):
            return super().__eq__(other)
        self._ordered(other)
        return not (self._less(other) if self.experts <= other.experts else other._less(self))

    def __lt__(self, other: Any) -> bool:
        return (self.experts <= other.experts and self._less(other)) if self._ordered(other) else super().__lt__(other)

    def __gt__(self, other: Any) -> bool:
        return (other.experts <= self.experts and other._less(self)) if self._ordered(other) else super().__gt__(other)

    def __le__(self, other: Any) -> bool:
        return not self > other if self._ordered(other) else super().__le__(other)

    def __ge__(self, other: Any) -> bool:
        return not self < other if self._ordered(other) else super().__ge__(other)

    def _ordered(self, other: Any) -> bool:
        if not isinstance(other, SegmentBound):
            return False
        if not self._same(other) or not (self.experts <= other.experts or other.experts <= self.experts):
            _refused()
        return True

    __hash__ = int.__hash__
