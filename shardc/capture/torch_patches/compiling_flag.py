"""`torch.compiler.is_compiling()` in a trace: true for libraries, and for the user's code what lets it be traced.

if not torch.compiler.is_compiling():
    assert (x > 0).all()      # traced as on one device; if that cannot be, with is_compiling() true at this place
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from typing import cast

from shardc.capture.user_frames import is_installed

_ASKING = (__file__, os.path.join("torch", "compiler", "__init__.py"), os.path.join("_dynamo", "external_utils.py"))


Place = tuple[str, int]
"""A file, and a line in it."""


class CompilingFlag(int):
    """Libraries ask it before they branch on values; so does the user's code, but what it does otherwise is what counts
    on one device. So the user's code is told no, but for the places in `told`. `last` is the place that asked last."""

    def __new__(cls, told: Collection[Place] = ()) -> CompilingFlag:
        return super().__new__(cls, 1)

    def __init__(self, told: Collection[Place] = ()) -> None:
        self.told, self.last = told, cast("Place | None", None)

    def __bool__(self) -> bool:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.endswith(_ASKING):
            frame = frame.f_back
        if is_installed(frame.f_code.co_filename):
            return True
        self.last = frame.f_code.co_filename, frame.f_lineno
        return self.last in self.told

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    __hash__ = int.__hash__
