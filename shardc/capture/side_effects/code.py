"""What a function's code names: attributes, globals, and strings that may name an attribute.

def forward(self, x):
    return x / getattr(self.config, "tau") * SCALE     # -> config, getattr, tau, SCALE
"""

from __future__ import annotations

import dis
import re
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any


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
    evaluates = not EVALUATE.isdisjoint(code.co_names)
    for constant in code.co_consts:
        for text in constant if isinstance(constant, (tuple, frozenset)) else (constant,):
            if isinstance(text, str):
                yield from _WORD.findall(text) if evaluates else parts_of(text)


def parts_of(text: str) -> list[str]:
    """The names in `config.scale`; none in what is no dotted name."""
    parts = text.split(".")
    return parts if all(map(str.isidentifier, parts)) else []


EVALUATE = frozenset({"eval", "exec"})
LOOK_UP = frozenset({"getattr", "hasattr", "attrgetter", "setattr", "__getattribute__", "vars", "__dict__", "globals"})
"""What code names that looks attributes up by names which it computes, or all at once."""

CONSTRUCTORS = frozenset({"__init__", "__new__", "__post_init__"})
"""Methods that run where an object is made."""


@cache
def may_construct(code: CodeType) -> bool:
    """Whether code may make an object of a class that it does not name: by the class of another object."""
    parts = [part for part in _nested(code) if not _CLASS_OF.isdisjoint(part.co_names)]
    return any(
        one.argval in CONSTRUCTORS or one.argval in ("__class__", "replace") or one.opname == "LOAD_GLOBAL"
        for part in parts
        for one in dis.get_instructions(part)
        if one.argval in _CLASS_OF
    )


_CLASS_OF = frozenset({*CONSTRUCTORS, "__class__", "replace", "type"})

_WORD = re.compile(r"[^\W\d]\w*")


@cache
def looks_up(code: CodeType) -> bool:
    """Whether code may look up an attribute whose name it computes."""
    return not LOOK_UP.isdisjoint(free_names(code))


@cache
def pieces(code: CodeType) -> frozenset[str]:
    """The fixed parts of names that code may compute: `head_` of `f"head_{i}"`, and of `"head_" + name`."""
    found = (text for part in _nested(code) if looks_up(part) for text in _joined(part))
    return frozenset(text for text in found if text.replace("_", "").isalnum())


def _joined(code: CodeType) -> Iterator[str]:
    """The strings with which code joins other values."""
    instructions = list(dis.get_instructions(code))
    for k, one in enumerate(instructions):
        beside: list[dis.Instruction] = []
        if one.opname.startswith("FORMAT_"):
            beside = [instructions[_start(instructions, k) - 1], instructions[k + 1]]
        elif one.opname == "BINARY_OP":
            beside = [instructions[k - 1], instructions[_start(instructions, k) - 1]]
        elif one.opname in ("LOAD_METHOD", "LOAD_ATTR") and one.argval == "format":
            beside = [instructions[k - 1]]
        for constant in beside:
            if constant.opname == "LOAD_CONST" and isinstance(constant.argval, str):
                yield from re.split(r"[{%]\w*}?", constant.argval)


def _start(instructions: list[dis.Instruction], end: int) -> int:
    """Where the code of the topmost value on the stack before `end` starts, if it does not branch."""
    missing, k = 1, end
    while missing > 0 and k > 0:
        k -= 1
        missing -= dis.stack_effect(instructions[k].opcode, instructions[k].arg, jump=False)
    return k


def makes_tensors(function: Any) -> bool:
    """Whether a function's code names anything of torch: then its results may hold tensors."""
    code = getattr(function, "__code__", None)
    space = getattr(function, "__globals__", {})
    named = [space.get(name) for name in free_names(code)] if code is not None else []
    return any(_home(value).partition(".")[0] == "torch"
               for value in named if isinstance(value, (ModuleType, type, FunctionType)))  # fmt: skip


_CHANGING = frozenset(
    {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "STORE_SUBSCR", "DELETE_SUBSCR"}
)
_CHANGE = frozenset(
    {"append", "add", "update", "extend", "setdefault", "pop", "insert", "remove", "clear", "setattr", "delattr"}
)


def changes_something(function: Any) -> bool:
    """Whether a function's own code has an instruction, or names a method, that changes an object."""
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    return not free_names(code).isdisjoint(_CHANGE) or any(
        one.opname in _CHANGING for part in _nested(code) for one in dis.get_instructions(part)
    )


def _home(value: Any) -> str:
    return value.__name__ if isinstance(value, ModuleType) else str(value.__module__)
