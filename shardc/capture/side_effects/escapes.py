"""Tensors of a trace that are still alive when it is over: some code has kept them where they are of no use.

    later.append(lambda: h.sum())     # CaptureError: ... a value made at model.py:12 is kept by a function

What the model leaves in places that it can name is taken out of there and replayed at every run. What is left over was
kept by other means.
"""

from __future__ import annotations

import gc
import weakref
from types import CellType, FrameType, FunctionType
from typing import Any

from torch import Tensor

from shardc.capture.torch_patches.fake_tensors import is_traced
from shardc.errors import CaptureError


class Escapes:
    """The tensors that operators of a trace have returned, for as long as someone holds them."""

    def __init__(self) -> None:
        self._made: list[tuple[weakref.ref[Any], str]] = []

    def note(self, result: Any, line: str) -> None:
        """An operator at `line` returned `result`."""
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if is_traced(tensor):
                self._made.append((weakref.ref(tensor), line))

    def check(self) -> None:
        """Raise CaptureError if some tensor is still held. Caches of functions that hold one are emptied."""
        for generation in range(3):  # what only holds itself is young, and most objects of a process are not
            if not self._held():
                return
            gc.collect(generation)
        held = self._held()
        for tensor, _ in held:
            for holder in gc.get_referrers(tensor):
                if hasattr(holder, "cache_clear"):
                    holder.cache_clear()
        del held
        for tensor, line in self._held():
            raise CaptureError(
                f"a tensor of shape {tuple(tensor.shape)} made at {line} is kept by {_keeper(tensor)} after forward: a "
                "compiled program cannot keep it there again. Return it, or assign it to an attribute of the model"
            )

    def _held(self) -> list[tuple[Tensor, str]]:
        return [(tensor, line) for ref, line in self._made if (tensor := ref()) is not None]


def _keeper(tensor: Tensor) -> str:
    """Who holds a tensor: a variable of a function, or an object of some class."""
    for holder in gc.get_referrers(tensor):
        ours = isinstance(holder, tuple) and len(holder) == 2 and isinstance(holder[1], str)
        if isinstance(holder, CellType):
            functions = [one for one in _within(holder) if isinstance(one, FunctionType)]
            return f"the function {functions[0].__qualname__}" if functions else "a function"
        if not ours and not isinstance(holder, FrameType):
            return f"a {type(holder).__name__}"
    return "an object that Python does not show"


def _within(cell: CellType) -> list[Any]:
    return [function for closure in gc.get_referrers(cell) for function in gc.get_referrers(closure)]
