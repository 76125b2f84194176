"""What a function's code names: attributes, globals, and strings that may name an attribute.

def forward(self, x):
    return x / getattr(self.config, "tau") * SCALE     # -> config, getattr, tau, SCALE
"""

from __future__ import annotations

import dis
import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = tuple(
    str(path) + os.sep for path in (Path(__file__).parents[2], Path(__file__).resolve().parents[3] / "runtime")
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


@cache
def is_installed(filename: str) -> bool:
    """Whether a file belongs to a library: one of those that are known, or any that is installed."""
    return is_known(filename) or filename.startswith(_INSTALLED)


@cache
def names(code: CodeType) -> frozenset[str]:
    """The attributes and globals that code names, also in functions defined within, and its strings that could name
    one."""
    return frozenset(name for part in _nested(code) for name in (*part.co_names, *_strings(part)))


@cache
def free_names(code: CodeType) -> frozenset[str]:
    """The names that code may look up in its globals."""
    return frozenset(name for part in _nested(code) for name in part.co_names)


@cache
def imported(code: CodeType) -> frozenset[str]:
    """The modules that code imports when it runs."""
    parts = [part for part in _nested(code) if dis.opmap["IMPORT_NAME"] in part.co_code[::2]]
    instructions = (instruction for part in parts for instruction in dis.get_instructions(part))
    return frozenset(str(one.argval) for one in instructions if one.opname == "IMPORT_NAME")


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _strings(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        for text in constant if isinstance(constant, (tuple, frozenset)) else (constant,):
            if isinstance(text, str) and text.isidentifier():
                yield text


def makes_tensors(function: Any) -> bool:
    """Whether a function's code names anything of torch: then its results may hold tensors."""
    code = getattr(function, "__code__", None)
    space = getattr(function, "__globals__", {})
    named = [space.get(name) for name in free_names(code)] if code is not None else []
    return any(_home(value).partition(".")[0] == "torch"
               for value in named if isinstance(value, (ModuleType, type, FunctionType)))  # fmt: skip


def _home(value: Any) -> str:
    return value.__name__ if isinstance(value, ModuleType) else str(value.__module__)
