"""What a micro-batch has of values that do not depend on the batch."""

from __future__ import annotations

from typing import Any

import torch

from shardc.rules.notation import Rule, letters, mark, parse, rule
from shardc.runtime.kernels.parts import addend_of_microbatch, part_of_microbatch


@rule(part_of_microbatch)
def part(x: torch.Tensor, *, dim: int, **_: Any) -> Rule:
    """The dim that is parted stays whole: its parts are not where the chunks of ranks are."""
    names = letters(x)
    made = [*names]
    made[dim] = "part"
    return parse(f"{mark(names, [dim])} -> {mark(made, [dim])}", [{0}])


@rule(addend_of_microbatch)
def addend(x: torch.Tensor, **_: Any) -> Rule:
    names = " ".join(letters(x))
    return parse(f"{names} -> {names}", [{0}])
