"""What a call is given: its leaves, and all else that decides which compiled program fits it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from shardc import compat
from shardc.errors import CaptureError


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and structure; dataclasses are opened, also where nobody told torch about the class."""
    leaves, spec = pytree.tree_flatten(tree)
    unknown = {type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)}
    if not unknown and not compat.register_caches(leaves):
        return leaves, spec
    for cls in unknown:
        pytree.register_dataclass(cls)
    return flatten(tree)


def refuse_opaque(leaves: Iterable[Any]) -> None:
    """CaptureError for an object that pytree does not open: tensors inside would be burned into the program."""
    for leaf in leaves:
        held: list[Any] = []
        if not isinstance(leaf, Tensor):
            held = [*getattr(leaf, "__dict__", {}).values(), *(leaf.values() if isinstance(leaf, Mapping) else ())]  # type: ignore[misc]
        if isinstance(leaf, np.ndarray) or any(isinstance(item, Tensor) for item in held):
            raise CaptureError(
                f"an input of type {type(leaf).__name__} holds values that would be burned into the program: pass "
                "tensors, in tuples, lists, dicts or dataclasses, or register its class with "
                "torch.utils._pytree.register_pytree_node"
            )


def refuse_foreign(constant: Tensor) -> None:
    """CaptureError for a parameter that the program reaches past the model: its gradient would be lost."""
    if constant.requires_grad:
        raise CaptureError(
            f"the program uses a tensor of shape {tuple(constant.shape)} that requires a gradient, and is neither an "
            "input nor a parameter of the model: make it one, or shard the module that owns it"
        )


def refuse_sparse(nodes: Iterable[fx.Node]) -> None:
    """CaptureError for a value that is no dense tensor: layouts say nothing about where its elements lie."""
    for node in nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and value.layout is not torch.strided:
                raise CaptureError(
                    f"{node.target} ({', '.join(part for part in node.meta.get('place', ()) if part)}) makes a tensor "
                    f"stored as {value.layout}: only dense tensors can be sharded; convert it outside of the model, or "
                    "compute with dense tensors"
                )


def call_key(
    module: nn.Module, leaves: list[Any], dynamic: Mapping[int, Collection[int]] | None = None
) -> tuple[Any, ...]:
    """Everything a captured program depends on besides the values of tensors, and the sizes of `dynamic` dims."""
    free = dynamic or {}
    inputs = tuple(_leaf_key(leaf, free.get(index, ())) for index, leaf in enumerate(leaves))
    attributes = tuple(_attributes(part) for part in module.modules())
    state = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in (*module.parameters(), *module.buffers()))
    casts = tuple(
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")
    )
    return torch.is_grad_enabled(), casts, torch.get_default_dtype(), inputs, attributes, state


def _leaf_key(leaf: Any, free: Collection[int]) -> Any:
    if isinstance(leaf, Tensor):
        shape = tuple("any" if dim in free else size for dim, size in enumerate(leaf.shape))
        return shape, leaf.dtype, leaf.requires_grad
    if isinstance(leaf, (int, float, complex, slice)) or type(leaf).__hash__ is None:
        return type(leaf), repr(leaf)
    return type(leaf), leaf  # the key keeps it alive, so that no other object can take its place


def _attributes(part: nn.Module) -> tuple[Any, ...]:
    """What forward may read of a module besides its state: plain values, and tensors that are no state, by identity."""
    return tuple(
        (name, type(value), id(value) if isinstance(value, Tensor) else repr(value))
        for name, value in vars(part).items()
        if isinstance(value, (bool, int, float, str, Tensor, tuple, type(None)))
    )
