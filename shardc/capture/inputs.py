"""The inputs of a call: their leaves, and the key that says which compiled program fits the call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from shardc.capture.torch_patches import transformers
from shardc.errors import CaptureError
from shardc.ir.facts import Origin
from shardc.runtime.mesh.parameters import RECORD


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and structure. Dataclasses are opened, also those that nobody registered with torch."""
    leaves, spec = pytree.tree_flatten(tree)
    unknown = {type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)}
    if not unknown and not transformers.register_caches(leaves):
        return leaves, spec
    for cls in unknown:
        pytree.register_dataclass(cls)
    return flatten(tree)


def refuse_opaque(leaves: Iterable[Any]) -> None:
    """Raise CaptureError for an object that pytree does not open: the program would keep the tensors inside as
    constants."""
    for leaf in leaves:
        contents: list[Any] = []
        if not isinstance(leaf, Tensor):
            contents = [*getattr(leaf, "__dict__", {}).values(), *(leaf.values() if isinstance(leaf, Mapping) else ())]  # type: ignore[misc]
        if isinstance(leaf, np.ndarray) or any(isinstance(item, Tensor) for item in contents):
            raise CaptureError(
                f"an input of type {type(leaf).__name__} holds values that would be burned into the program: pass "
                "tensors, in tuples, lists, dicts or dataclasses, or register its class with "
                "torch.utils._pytree.register_pytree_node"
            )


def refuse_foreign(constant: Tensor) -> None:
    """Raise CaptureError for a parameter that is no parameter of the model: its gradient would be lost."""
    if constant.requires_grad:
        raise CaptureError(
            f"the program uses a tensor of shape {tuple(constant.shape)} that requires a gradient, and is neither an "
            "input nor a parameter of the model: make it one, or shard the module that owns it"
        )


def refuse_sparse(nodes: Iterable[fx.Node], origins: Mapping[fx.Node, Origin]) -> None:
    """Raise CaptureError for a value that is no dense tensor: layouts describe dense tensors only."""
    for node in nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and value.layout is not torch.strided:
                place = ", ".join(part for part in (origins[node].module, origins[node].source) if part)
                raise CaptureError(
                    f"{node.target} ({place}) makes a tensor stored as {value.layout}: only dense tensors can be "
                    "sharded; convert it outside of the model, or compute with dense tensors"
                )


def call_key(
    module: nn.Module, leaves: list[Any], dynamic: Mapping[int, Collection[int]] | None = None
) -> tuple[Any, ...]:
    """Everything a captured program depends on besides the values of tensors, and the sizes of `dynamic` dims."""
    free = dynamic or {}
    inputs = tuple(_leaf_key(leaf, free.get(index, ())) for index, leaf in enumerate(leaves))
    known: dict[int, tuple[Any, bool]] = {}
    attributes = tuple(_attributes(part, part is module, known) for part in module.modules())
    with torch._C.DisableTorchFunctionSubclass():  # attributes of DTensors are slow otherwise
        state = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in (*module.parameters(), *module.buffers()))
    casts = tuple(
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")
    )
    return torch.is_grad_enabled(), casts, torch.get_default_dtype(), inputs, attributes, state


def _leaf_key(leaf: Any, free: Collection[int]) -> Any:
    if isinstance(leaf, Tensor):
        shape = tuple("any" if dim in free else size for dim, size in enumerate(leaf.shape))
        # results are laid out in memory as operands are, and eager mode draws random numbers in the order of memory
        order = None if leaf.is_contiguous() else tuple(sorted(range(leaf.dim()), key=leaf.stride, reverse=True))
        return shape, leaf.dtype, leaf.requires_grad, order
    if isinstance(leaf, (int, float, complex, slice)) or type(leaf).__hash__ is None:
        return type(leaf), repr(leaf)
    return type(leaf), leaf  # the key keeps it alive, so that no other object can take its place


_NOT_SETTINGS = frozenset((*vars(nn.Module()), "_shardc", RECORD)) - {"training"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, slice)
_NAMED = (type, FunctionType, BuiltinFunctionType)
_LONG = 1000
"""Lists and dicts with more elements are compared by identity and length: to read them all would take too long."""


def _attributes(part: nn.Module, root: bool, known: dict[int, tuple[Any, bool]]) -> tuple[Any, ...]:
    """What forward may read of a module besides its state: its class, its settings, and the numbers of its hooks.

    torch gives no number to two hooks. Hooks of the root are not part of the program. Tensors that are no state are
    compared by identity.
    """
    attributes = vars(part)
    hooks = () if root else tuple(tuple(attributes[name]) for name in _HOOKS)
    return type(part), hooks, tuple((k, _setting(v, known)[0]) for k, v in attributes.items() if k not in _NOT_SETTINGS)


def _setting(value: Any, known: dict[int, tuple[Any, bool]]) -> tuple[Any, bool]:
    """A value that forward may read, as a key, and whether the key is complete: whether it says all of the value.

    Lists, dicts and objects made of plain values (configurations) are compared by their contents. Of any other object
    only the class counts: a trainer or a logger, say, changes all the time, and the program does not depend on it.
    """
    if isinstance(value, Tensor):
        return id(value), True
    if isinstance(value, _PLAIN):
        return (type(value), repr(value)), True
    if isinstance(value, _NAMED):
        return value, True
    if id(value) not in known:  # the model keeps all values alive, so that no two have one id
        known[id(value)] = type(value), False  # also ends circles
        known[id(value)] = _compound(value, known)
    return known[id(value)]


def _compound(value: Any, known: dict[int, tuple[Any, bool]]) -> tuple[Any, bool]:
    if isinstance(value, (list, tuple, set, frozenset, Mapping)):
        if len(value) > _LONG:
            return (type(value), id(value), len(value)), True
        items: Iterable[Any] = (*value, *value.values()) if isinstance(value, Mapping) else value
        pairs = [_setting(item, known) for item in items]
        return (type(value), tuple(key for key, _ in pairs)), all(complete for _, complete in pairs)
    if isinstance(value, functools.partial):
        return _compound((value.func, value.args, value.keywords), known)
    if isinstance(value, nn.Module) or not hasattr(value, "__dict__"):
        return type(value), False
    key, complete = _setting(vars(value), known)
    return (type(value), key) if complete else type(value), complete
