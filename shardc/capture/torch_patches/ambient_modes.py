"""Modes of torch that user code may have entered around a call, and how to step outside of them."""

from __future__ import annotations

from typing import Any

import torch

# What torch.compile checks before every call, in one call: torch's public functions tell of one switch each.
from torch._C._dynamo.guards import GlobalStateGuard

# `DisableTorchFunctionSubclass` would leave function modes on, and one of them is Provenance.
unobserved = torch._C.DisableTorchFunction
"""While this context is entered, function modes do not see what is done to tensors."""


def modes() -> tuple[Any, ...]:
    """What user code may have entered around a call: how many function modes and dispatch modes, and the hooks on saved
    tensors. Two calls of a layer under equal modes are traced alike. torch has no public way to ask."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(), hooks


class Switches:
    """The global switches of torch on which results depend, as they are now: whether gradients are recorded, autocast,
    the default dtype, how exact results are, and how many threads there are."""

    def __init__(self) -> None:
        self._precision = torch.get_float32_matmul_precision()
        self._others = GlobalStateGuard()

    def same(self) -> bool:
        """Whether none has changed since."""
        return self._others.check() and torch.get_float32_matmul_precision() == self._precision
