"""Amounts of memory as people write them, and the bytes that optimizers hold for every parameter."""

from __future__ import annotations

import re
from dataclasses import dataclass

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
STATES = {"sgd": 0, "momentum": 1, "adagrad": 1, "rmsprop": 1, "lion": 1, "adam": 2, "adamw": 2, "nadam": 2}
"""Tensors of the parameter's size and dtype that an optimizer of torch keeps for it (lion: Chen et al. 2023)."""


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
    """What an optimizer holds for every parameter: `copies` of its size and dtype, and `bytes` more an element."""

    copies: int = 0
    bytes: float = 0.0

    def __call__(self, itemsize: int) -> float:
        """Bytes for one element of a parameter whose elements have `itemsize` bytes."""
        return self.copies * itemsize + self.bytes


NO_STATES = States()


def states_of(optimizer: str | float | None) -> States:
    """What an optimizer holds for every parameter.

    `optimizer` is a name from `STATES`, or a number of bytes an element (12 for mixed-precision Adam with a master copy
    in float32), or None for nothing. Raises ShardcError for an unknown name.
    """
    if optimizer is None:
        return NO_STATES
    if isinstance(optimizer, (int, float)):
        return States(bytes=float(optimizer))
    if optimizer.lower() not in STATES:
        raise ShardcError(
            f"optimizer={optimizer!r} is not known; it is one of {', '.join(STATES)}, or the bytes it holds for an "
            f"element of a parameter"
        )
    return States(STATES[optimizer.lower()])
