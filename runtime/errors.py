"""Errors on a rank: each names the rank, the axis and collective, and the line of generated code."""

from __future__ import annotations

import linecache
import os
from collections.abc import Mapping
from types import TracebackType

import torch

GENERATED = "__shardc_generated__"  # a global that marks generated modules, so that tracebacks can be searched for them
_HIDDEN = (os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.abspath(torch.__file__)))


class ShardcError(Exception):
    """Base of every error that shardc raises on purpose."""


class RankError(ShardcError, RuntimeError):
    """A run that failed on a rank, or a request to the runtime that it cannot fulfil.

    `rank` is the rank that failed first (None if no rank was running). `axis` is the mesh axis of the collective under
    way (None outside of collectives). `line` is the line of generated code with its trailing comment ("" if there is
    none).
    """

    def __init__(self, message: str, *, rank: int | None = None, axis: str | None = None, line: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.axis = axis
        self.line = line


def generated_line(traceback: TracebackType | None) -> tuple[str, str]:
    """Place and text of the line that failed: `("file.py:41", "h = all_reduce(h, axis='tp')  # mlp, model.py:12")`.

    It is the innermost line of `traceback` in a generated module, else the innermost that is neither torch's nor this
    package's. Both are empty if there is none.
    """
    place, line, is_generated = "", "", False
    while traceback is not None:
        code = traceback.tb_frame.f_code
        here = GENERATED in traceback.tb_frame.f_globals
        if here or not (is_generated or os.path.abspath(code.co_filename).startswith(_HIDDEN)):
            place = f"{code.co_filename}:{traceback.tb_lineno}"
            line = linecache.getline(code.co_filename, traceback.tb_lineno).strip()
            is_generated = here
        traceback = traceback.tb_next
    return place, line


def rank_error(
    error: BaseException, rank: int, coordinates: Mapping[str, int], operation: tuple[str, str] | None
) -> RankError:
    """The RankError for `error`, which ended `rank` while `operation` = (collective, axis) was under way.

    A RankError that names its rank is returned unchanged.
    """
    if isinstance(error, RankError) and error.rank is not None:
        return error
    place, line = generated_line(error.__traceback__)
    at = " ".join(f"{axis}={index}" for axis, index in coordinates.items())
    text = f"rank {rank} ({at}) failed" if at else f"rank {rank} failed"
    if operation is not None:
        text += f" in {operation[0]} over axis {operation[1]!r}"
    if place:
        text += f" at {place}: {line}"
    prefix = "" if isinstance(error, RankError) else f"{type(error).__name__}: "
    result = RankError(f"{text}\n  {prefix}{error}", rank=rank, axis=operation[1] if operation else None, line=line)
    result.__cause__ = error
    return result
