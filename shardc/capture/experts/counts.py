"""How many rows a mask selects, which only a run knows: whether there are any has an answer, all else has none."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn, TypeGuard

import torch

from shardc.capture.torch_patches.fake_tensors import DynamicOutputShapeException
from shardc.capture.trace_errors import explained
from shardc.capture.user_frames import user_frame
from shardc.errors import CaptureError

CodePlace = tuple[str, tuple[str, int] | None]
"""A module, and a file and line."""


@dataclass(frozen=True)
class Truth:
    """The tensor says of selections whether they have rows (True), that they have none (False), or how many (None)."""

    value: bool | None


@dataclass(frozen=True)
class Counts:
    """The tensor has these numbers, of experts that have rows."""

    numbers: tuple[int, ...]


class EmptyCase(Enum):
    """What a trace is told of selections: that none is empty; that all are, though of rows in the order of experts the
    first expert has all; or that all are, and of these the first expert's alone."""

    NONE = 0
    ALL = 1
    FIRST = 2


class Emptiness:
    """Whether selections are empty in a trace, and where code asked for it first."""

    def __init__(self, case: EmptyCase) -> None:
        self.case = case
        self._listed: CodePlace | None = None
        self.path = ""
        """The module that is running."""
        self.selected: CodePlace = "", None
        """Where rows were selected last."""
        self._asked: tuple[Exception, str, tuple[str, int] | None] | None = None

    def __bool__(self) -> bool:
        if self._asked is None:
            self._asked = unknown(), *self.place()
        return self.case is not EmptyCase.NONE

    def lists(self) -> None:
        """Code gets numbers of rows, of rows in the order of experts."""
        self.selected = self.place()
        self._listed = self._listed or self.selected

    @property
    def segmented(self) -> bool:
        """Whether code has got such numbers."""
        return self._listed is not None

    def empties(self, count: int) -> frozenset[int]:
        """The experts, of `count`, that have no segment."""
        if self.case is EmptyCase.NONE or count < 2:
            return frozenset()
        return frozenset({0}) if self.case is EmptyCase.FIRST else frozenset(range(1, count))

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

    def __new__(cls, value: int, empty: Emptiness) -> Count:
        made = super().__new__(cls, value)
        made._empty = empty
        return made

    def none(self) -> bool:
        """Whether there are no such rows, as the trace is told."""
        return bool(self._empty)

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
        return bool(self._empty) and self.experts <= self._empty.empties(count)

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
