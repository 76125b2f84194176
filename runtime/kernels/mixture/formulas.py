"""Elementwise formulas as text, which operators carry as arguments: calls of ATen operators by name.

mul(silu(gate), up)
a = mul(grad, up); silu_backward(a, gate), mul(grad, silu(gate))     several steps, several results
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.errors import RankError

__all__: list[str] = []

Formula = Callable[..., Any]


@lru_cache(maxsize=256)
def formula(text: str, *arguments: str) -> Formula:
    """The function of `arguments` that `text` writes. RankError where it cannot be read."""
    *steps, last = text.split("; ")
    try:
        body = "".join(f"    {step}\n" for step in steps)
        source = f"def formula({', '.join(arguments)}):\n{body}    return {last}\n"
        names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    except SyntaxError as error:
        raise RankError(f"{text!r} is no formula of {', '.join(arguments)}: {error.msg}") from None
    local = {*arguments, *(step.split(" = ")[0] for step in steps)}
    scope = {name: _meaning(name, text) for name in names - local}
    exec(source, scope)
    return scope["formula"]


def _meaning(name: str, text: str) -> Any:
    if name == "to":
        return _to
    kind = getattr(torch, name, None)
    if isinstance(kind, torch.dtype):
        return kind
    try:
        return getattr(torch.ops.aten, name)
    except AttributeError:
        raise RankError(f"{text!r} calls {name}, which is no operator of ATen") from None


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)
