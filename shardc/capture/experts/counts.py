"""How many rows a mask selects, which only a run knows: whether there are any has an answer, all else has none."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NoReturn

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


class Emptiness:
    """Whether selections are `empty` in a trace, and where code asked for it first."""

    def __init__(self, empty: bool) -> None:
        self._empty = empty
        self.path = ""
        """The module that is running."""
        self.selected: CodePlace = "", None
        """Where rows were selected last."""
        self._asked: tuple[Exception, str, tuple[str, int] | None] | None = None

    def __bool__(self) -> bool:
        if self._asked is None:
            self._asked = unknown(), *self.place()
        return self._empty

    def place(self) -> CodePlace:
        """Where the user's code is."""
        frame = user_frame(sys._getframe(1))
        return self.path, None if frame is None else (frame.f_code.co_filename, frame.f_lineno)

    @property
    def asked(self) -> CaptureError | None:
        """What to raise where code asked for it."""
        return None if self._asked is None else explained(*self._asked)


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
    zero; nothing can be computed of it."""

    _empty: Emptiness

    def __new__(cls, value: int, empty: Emptiness) -> Count:
        made = super().__new__(cls, value)
        made._empty = empty
        return made

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Count):
            return int.__eq__(self, other)
        return bool(self._empty) if other == 0 else _refused()

    def __ne__(self, other: object) -> bool:
        return not self.__eq__(other)

    def __gt__(self, other: int) -> bool:
        return not self._empty if other == 0 else _refused()

    def __ge__(self, other: int) -> bool:
        return not self._empty if other == 1 else _refused()

    def __lt__(self, other: int) -> bool:
        return bool(self._empty) if other == 1 else _refused()

    def __le__(self, other: int) -> bool:
        return bool(self._empty) if other == 0 else _refused()

    def __bool__(self) -> bool:
        return not self._empty

    __hash__ = int.__hash__
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refused  # type: ignore[assignment]
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __neg__ = __pow__ = __rpow__ = __float__ = _refused  # type: ignore[assignment]
