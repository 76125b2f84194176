"""Private state of modules and tensors: hooks and versions."""

from __future__ import annotations

from torch import Tensor, nn


def has_global_hooks() -> bool:
    """Whether hooks are registered on all modules. torch registers them publicly, and lists them nowhere."""
    return bool(nn.modules.module._has_any_global_hook())


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether `register_hook` was called on a tensor; torch has no public way to ask."""
    return bool(tensor._backward_hooks)


def version(tensor: Tensor) -> int:
    """How often a tensor was written in place. Only autograd reads this number, so it has no public name."""
    return tensor._version
