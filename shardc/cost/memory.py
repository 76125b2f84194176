"""Amounts of memory as people write them, and the bytes that optimizers hold for every parameter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardc.errors import ShardcError

UNITS = {
    "": 1.0,
    "B": 1.0,
    **{f"{prefix}B": 1e3 ** (i + 1) for i, prefix in enumerate("KMGT")},
    **{f"{prefix}IB": 1024.0 ** (i + 1) for i, prefix in enumerate("KMGT")},
}
HEADROOM = 0.1
"""The part of a device's memory that plans leave free where the bound is that of the hardware. What it is for: the
context of the device, buffers of NCCL, workspaces of kernels, gaps of the allocator, what an optimizer allocates while
it steps. None of that is counted in a plan's memory."""


class OptimizerTensor(NamedTuple):
    """A tensor of the parameter's shape that an optimizer keeps for it, or more than one alike: its `name`, and the
    `bits` of an element with what belongs to it; 0 for as many as the parameter's own elements have."""

    name: str
    bits: float = 0.0


MOMENTS = OptimizerTensor("exp_avg"), OptimizerTensor("exp_avg_sq")
BLOCKS = 32 / 256, 32 / 128
"""Bits an element of the scales, one in float32 for every 256 elements of 8 bits, or 128 of 4 bits (torchao)."""
STATES: dict[str, tuple[OptimizerTensor, ...]] = {
    "sgd": (),
    "momentum": (OptimizerTensor("momentum_buffer"),),
    "adagrad": (OptimizerTensor("sum"),),
    "rmsprop": (OptimizerTensor("square_avg"),),
    "lion": (OptimizerTensor("exp_avg"),),  # Chen et al. 2023
    "muon": (OptimizerTensor("momentum_buffer"),),
    "adadelta": (OptimizerTensor("square_avg"), OptimizerTensor("acc_delta")),
    "adam": MOMENTS,
    "adamw": MOMENTS,
    "nadam": MOMENTS,
    "radam": MOMENTS,
    "adamax": (OptimizerTensor("exp_avg"), OptimizerTensor("exp_inf")),
    "amsgrad": (*MOMENTS, OptimizerTensor("max_exp_avg_sq")),
    "adamw-master": (OptimizerTensor("master weight", 32), *(OptimizerTensor(moment.name, 32) for moment in MOMENTS)),
    "adamw-bf16": tuple(OptimizerTensor(moment.name, 16) for moment in MOMENTS),
    "adamw-8bit": tuple(OptimizerTensor(moment.name, 8 + BLOCKS[0]) for moment in MOMENTS),
    "adamw-4bit": tuple(OptimizerTensor(moment.name, 4 + BLOCKS[1]) for moment in MOMENTS),
}
"""What optimizers keep for every parameter: those of torch by their names, in the parameter's dtype; `amsgrad` is Adam
with that option. Then set-ups that people train with: `adamw-master` for parameters in 16 bits (Megatron-LM, DeepSpeed,
Apex), 16-bit moments, and those of torchao and bitsandbytes. Counters of steps are not counted."""


def bytes_of(amount: float | str) -> float:
    """`"80GB"` (10^9), `"24 GiB"` (2^30) or a number, in bytes. Raises ShardcError for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([A-Za-z]*)\s*", str(amount))
    try:
        assert match is not None
        size = float(match[1]) * UNITS[match[2].upper()]
    except (AssertionError, ValueError, KeyError):
        raise ShardcError(
            f"memory={amount!r} is not an amount of memory; write '80GB', '24 GiB', a number of bytes, or 'unbounded'"
        ) from None
    if size <= 0.0:
        raise ShardcError(f"memory={amount!r} leaves no memory; write an amount above zero, such as '80GB'")
    return size


@dataclass(frozen=True)
class States:
    """What the optimizer called `name` holds for every parameter. `print` says it in words."""

    name: str = ""
    tensors: tuple[OptimizerTensor, ...] = ()

    def __call__(self, itemsize: int) -> float:
        """Bytes for one element of a parameter whose elements have `itemsize` bytes."""
        return sum(state.bits / 8 or itemsize for state in self.tensors)

    def __str__(self) -> str:
        """`adamw: exp_avg and exp_avg_sq, each in the parameter's dtype`."""
        of_size: dict[float, list[str]] = {}
        for state in self.tensors:
            if not state.name:  # a number of bytes says it all
                return self.name
            of_size.setdefault(state.bits, []).append(state.name)
        each = [
            f"{_listed(names)}{', each' if len(names) > 1 else ''} "
            + (f"of {bits:g} bits" if bits else "in the parameter's dtype")
            for bits, names in of_size.items()
        ]
        return f"{self.name}: {'; '.join(each) or 'nothing'}"


def _listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), names[-1]])


NO_STATES = States()


def states_of(optimizer: str | float | None) -> States:
    """What an optimizer holds for every parameter.

    `optimizer` is a name from `STATES`, or a number of bytes an element (12 is `adamw-master`), or None for nothing.
    Raises ShardcError for an unknown name.
    """
    if optimizer is None:
        return NO_STATES
    if isinstance(optimizer, (int, float)):
        return States(f"{optimizer:g} bytes an element", (OptimizerTensor("", 8.0 * optimizer),) if optimizer else ())
    if optimizer.lower() not in STATES:
        raise ShardcError(
            f"optimizer={optimizer!r} is not known; it is one of {', '.join(STATES)}, or the bytes it holds for an "
            f"element of a parameter"
        )
    return States(optimizer.lower(), STATES[optimizer.lower()])
