"""Files that forward opens: what it reads would be a constant of the program, and what it writes would be missing.

tau = json.load(open("settings.json"))["tau"]     # CaptureError: forward opens settings.json at model.py:12
"""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

from shardc.capture.user_frames import is_known
from shardc.errors import CaptureError

_INSTALLED = (sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev")


class Files:
    """The first file that code outside of libraries opens while this object is entered."""

    def __init__(self) -> None:
        self._opened: tuple[str, str] | None = None

    def __enter__(self) -> Files:
        _WATCHING.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _WATCHING.remove(self)

    def opened(self, path: Any) -> None:
        """A file was opened in this thread."""
        if self._opened is None and isinstance(path, (str, os.PathLike)):
            frame = _user_frame(sys._getframe(2))
            if frame is not None and not os.path.abspath(path).startswith(_INSTALLED):
                self._opened = os.fspath(path), f"{frame.f_code.co_filename}:{frame.f_lineno}"

    def refuse(self) -> None:
        """Raise CaptureError if a file was opened."""
        if self._opened is not None:
            raise CaptureError(
                f"forward opens {self._opened[0]} at {self._opened[1]}: a compiled program would not open it again. "
                "Read it before, or write it after the call"
            )


_WATCHING: list[Files] = []


def _user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame outside of libraries; None where a module is imported, or torch opens a file for itself."""
    while frame is not None and is_known(frame.f_code.co_filename):
        if "importlib" in frame.f_code.co_filename or f"{os.sep}torch{os.sep}_" in frame.f_code.co_filename:
            return None
        frame = frame.f_back
    return frame


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _WATCHING:
        _WATCHING[-1].opened(arguments[0])


sys.addaudithook(_on_event)  # Python takes no such hook off again
