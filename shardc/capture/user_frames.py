"""Whose code is whose, and frames of the user's: which line called an operator, and which line raised an error."""

from __future__ import annotations

import os
import sysconfig
from functools import cache
from pathlib import Path
from types import FrameType, TracebackType

import numpy as np
import torch

_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = tuple(
    str(path) + os.sep for path in (Path(__file__).parents[1], Path(__file__).resolve().parents[2] / "runtime")
)
_STANDARD = os.path.join(sysconfig.get_path("stdlib"), "")
_INSTALLED = tuple(os.path.join(sysconfig.get_path(kind), "") for kind in ("purelib", "platlib"))
_KNOWN = (_TORCH, *_OURS, str(Path(np.__file__).parent) + os.sep, "<frozen", "<eval_with_key", "<shardc-")


@cache
def is_known(filename: str) -> bool:
    """Whether a file belongs to torch, NumPy, Python's library or shardc, whose functions keep nothing for the user
    and read nothing of the user's."""
    installed = filename.startswith(_INSTALLED)
    return filename.startswith(_KNOWN) or (filename.startswith(_STANDARD) and not installed)


def is_torch_or_ours(filename: str) -> bool:
    """Whether a file is torch's or shardc's, or code that one of them has made."""
    return filename.startswith((_TORCH, *_OURS, "<eval_with_key", "<shardc-"))


def is_of_modules(filename: str) -> bool:
    """Whether a file is one of torch.nn, which checks what it is given by forms and types alone."""
    return filename.startswith(os.path.join(_TORCH, "nn", ""))


@cache
def is_installed(filename: str) -> bool:
    """Whether a file belongs to a library: one of those that are known, or any that is installed."""
    return is_known(filename) or filename.startswith(_INSTALLED)


def caller_is_users(frame: FrameType | None) -> bool:
    """Whether the code that calls is none of torch, NumPy or shardc, also by way of Python's library (`json.dumps`)."""
    while frame is not None and frame.f_code.co_filename.startswith(_STANDARD) and is_known(frame.f_code.co_filename):
        frame = frame.f_back
    return frame is not None and not is_known(frame.f_code.co_filename)


def user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of user code among `frame` and its callers, or None."""
    while frame is not None and is_known(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def source_line(frame: FrameType | None) -> str:
    """The innermost line of user code as `model.py:41`; "" if there is none."""
    frame = user_frame(frame)
    return "" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def at_line(frame: FrameType | None) -> str:
    """The innermost line of user code with its whole path, as ` at models/model.py:41`; "" if there is none."""
    frame = user_frame(frame)
    return "" if frame is None else f" at {frame.f_code.co_filename}:{frame.f_lineno}"


def failing_line(traceback: TracebackType | None) -> tuple[str, int] | None:
    """The innermost file and line of user code that an exception passed through."""
    innermost: tuple[str, int] | None = None
    while traceback is not None:
        if not is_known(traceback.tb_frame.f_code.co_filename):
            innermost = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next
    return innermost
