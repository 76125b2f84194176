"""Private state of modules, tensors and dicts: hooks and versions."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import dict_version as _dict_version
from torch._subclasses.functional_tensor import FunctionalTensor


def has_global_hooks() -> bool:
    """Whether hooks are registered on all modules. torch registers them publicly, and lists them nowhere."""
    return bool(nn.modules.module._has_any_global_hook())


def global_hooks() -> dict[str, dict[Any, Any]]:
    """The registries of hooks on all modules, by their names, which end as those of a module's own do."""
    endings = ("_hooks", "_with_kwargs", "_always_called")
    space = vars(nn.modules.module)
    return {name: space[name] for name in space if name.startswith(("_global_forward", "_global_backward_"))
            and name.endswith(endings)}  # fmt: skip


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether `register_hook` was called on a tensor; torch has no public way to ask."""
    return bool(tensor._backward_hooks)


def version(tensor: Tensor) -> int:
    """How often a tensor, or a view of it, was written in place. Only autograd reads this number, so it has no public
    name. In a trace functionalization counts, also what is written through `.data` or by a `_foreach` function. Nobody
    counts for tensors that were made in inference mode: 0."""
    if isinstance(tensor, FunctionalTensor):
        return torch._functionalize_mutation_counter(tensor.elem)  # type: ignore[attr-defined]
    return 0 if tensor.is_inference() else tensor._version


dict_version: Callable[[dict[Any, Any]], int] = _dict_version
"""A number that is another one after every change of a plain dict. Python keeps it for itself, in each version in
another way; torch.compile asks for it before every call."""


def namespace_of(cls: type) -> dict[str, Any]:
    """The dict in which a class holds its attributes, to be read: `vars` shows a view of it, which has no version."""
    return next(held for held in gc.get_referents(vars(cls)) if type(held) is dict)
