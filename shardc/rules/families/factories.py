"""Operators without tensor operands: each rank makes its part of the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardc.rules.notation import Rule, parse, rule
from shardc.runtime.kernels import moves

aten = torch.ops.aten


def _names(shape: Sequence[int], tail: str = "") -> str:
    return " ".join(f"n{i}{tail}" if size != 1 else "1" for i, size in enumerate(shape))


@rule(aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format)
def constant(shape: Sequence[int], *_: Any, **__: Any) -> Rule:
    return parse(f"-> {_names(shape)}", sizes={0: 0})


@rule(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)
def constant_like(x: torch.Tensor, shape: Sequence[int], *_: Any, **__: Any) -> Rule:
    whole = " ".join(f"x{i}!" if size != 1 else "1" for i, size in enumerate(x.shape))
    return parse(f"{whole} -> {_names(shape)}", sizes={1: 0})


@rule(aten.arange.start_step, aten.arange.default, aten.arange.start)
def arange(*arguments: Any, **_: Any) -> Rule:
    numbers = [g for g in arguments if isinstance(g, (int, float))]
    count = len(torch.arange(*numbers, device="meta"))
    return parse(f"-> {'n~' if count != 1 else '1'}", body=moves.arange, folds="n" if count != 1 else "")


@rule(aten.linspace.default)
def linspace(start: float, end: float, steps: int, **_: Any) -> Rule:
    del start, end
    return parse(f"-> {'n~' if steps != 1 else '1'}", body=moves.linspace, folds="n" if steps != 1 else "")


@rule(aten.eye.default, aten.eye.m)
def eye(rows: int, columns: int | None = None, **_: Any) -> Rule:
    sizes = [rows, rows if columns is None else columns]
    return parse(f"-> {' '.join(f'd{i}~' if n != 1 else '1' for i, n in enumerate(sizes))}", body=moves.eye)


@rule(aten.scalar_tensor.default)
def scalar(*_: Any, **__: Any) -> Rule:
    return parse("-> ")
