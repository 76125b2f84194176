"""Generated code calls torch's operators directly: without the layers that torch puts around them for autograd and for
Python.

    aten.mm.default(x, w)        as it is written: a Python call, then the layer that records, then the kernel
                                 as it runs: the kernel

A run is one node of the autograd graph, and records nothing by itself. On small tensors these layers take as long as
the kernel.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch

_DIRECT = "__direct__"
"""A global of a generated module: whether all that it calls is torch's, or the runtime's."""

_OWN = frozenset({"aten", "prims", "shardc"})
"""Namespaces of operators that do not differentiate inside of themselves."""


def call_directly(module: ModuleType) -> None:
    """From now on, a generated module calls torch's operators without Python's layer, and `unrecorded` holds for it."""
    if _DIRECT not in vars(module):
        theirs = any(_is_users(value, module) for value in vars(module).values())
        setattr(module, _DIRECT, not theirs and _namespaces(module) <= _OWN)
    if getattr(module, "aten", None) is torch.ops.aten:
        module.aten = _ATEN  # type: ignore[attr-defined]


def unrecorded(function: Callable[..., Any]) -> AbstractContextManager[object]:
    """Until the end, this thread's operators skip the layer that records for autograd, if `function` is of a module
    that calls nothing of users. What users wrote may differentiate inside of itself."""
    direct = getattr(function, "__globals__", {}).get(_DIRECT, False)
    return torch._C._AutoDispatchBelowAutograd() if direct else nullcontext()


def _is_users(value: object, module: ModuleType) -> bool:
    """Whether a global of a generated module is a function that a user wrote: the body of a variant."""
    if not callable(value) or isinstance(value, type) or getattr(value, "__globals__", None) is vars(module):
        return False
    return not str(getattr(value, "__module__", "")).startswith(("shardc.runtime", "torch"))


def _namespaces(module: ModuleType) -> set[str]:
    """Those of the operators that a generated module calls."""
    return set(re.findall(r"\btorch\.ops\.(\w+)", "".join(linecache.getlines(str(module.__file__)))))


class _Operator:
    """The overloads of an operator; each is the built-in function within torch's object for it."""

    def __init__(self, operator: Any) -> None:
        self._operator = operator

    def __getattr__(self, overload: str) -> Callable[..., Any]:
        call: Callable[..., Any] = getattr(self._operator, overload)._op
        setattr(self, overload, call)
        return call


class _Operators:
    """The operators of a namespace of torch."""

    def __init__(self, namespace: Any) -> None:
        self._namespace = namespace

    def __getattr__(self, name: str) -> _Operator:
        operator = _Operator(getattr(self._namespace, name))
        setattr(self, name, operator)
        return operator


_ATEN = _Operators(torch.ops.aten)
