"""The global switches of torch, told by one call of what torch.compile checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardc.capture.torch_patches.ambient_modes import Switches


def test_switches_of_torch_tell_that_one_has_changed() -> None:
    def cast(kind: str, dtype: torch.dtype | None) -> None:
        torch.set_autocast_enabled(kind, dtype is not None)
        torch.set_autocast_dtype(kind, torch.bfloat16 if dtype is None else dtype)

    precision: Callable[[str], None] = torch.set_float32_matmul_precision
    changes: list[tuple[Callable[[Any], object], Any, Any]] = [
        (torch.set_grad_enabled, False, True),
        (torch.set_default_dtype, torch.float64, torch.float32),
        (torch.use_deterministic_algorithms, True, False),
        (lambda dtype: cast("cpu", dtype), torch.bfloat16, None),
        (lambda dtype: cast("cuda", dtype), torch.bfloat16, None),
        (precision, "high", "highest"),
        (precision, "medium", "highest"),
    ]
    switches = Switches()
    for change, other, usual in changes:
        change(other)
        differs, there = not switches.same(), Switches()
        change(usual)
        assert differs and switches.same() and not there.same(), other
