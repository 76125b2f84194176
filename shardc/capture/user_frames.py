"""Frames of the user's code: which line called an operator, and which line raised an error."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, TracebackType

import torch

_TORCH = str(Path(torch.__file__).parent)
_SHARDC = str(Path(__file__).parents[1])
_RUNTIME = str(Path(__file__).resolve().parents[2] / "runtime")


def is_user_code(code: CodeType) -> bool:
    """Whether code belongs to neither torch nor shardc."""
    return _is_user_file(code.co_filename)


@cache
def _is_user_file(filename: str) -> bool:
    return not filename.startswith((_TORCH, _SHARDC, _RUNTIME, "<frozen", "<eval_with_key"))


def user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of user code among `frame` and its callers, or None."""
    while frame is not None and not is_user_code(frame.f_code):
        frame = frame.f_back
    return frame


def source_line(frame: FrameType | None) -> str:
    """The innermost line of user code as `model.py:41`; "" if there is none."""
    frame = user_frame(frame)
    return "" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def failing_line(traceback: TracebackType | None) -> tuple[str, int] | None:
    """The innermost file and line of user code that an exception passed through."""
    innermost: tuple[str, int] | None = None
    while traceback is not None:
        if is_user_code(traceback.tb_frame.f_code):
            innermost = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next
    return innermost
