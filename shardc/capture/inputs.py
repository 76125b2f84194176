"""The inputs of a call: their leaves, and the key that says which compiled program fits the call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from shardc.capture.repeated_layers import Itself
from shardc.capture.side_effects.holders import Location
from shardc.capture.side_effects.reachable import PLAIN
from shardc.capture.side_effects.replay import holds_tensors
from shardc.capture.torch_patches.key_value_caches import is_cache
from shardc.errors import CaptureError
from shardc.ir.facts import Origin
from shardc.ir.program import name_of
from shardc.runtime.execute.transforms import refuse_transforms


def flatten(tree: Any, known: Collection[int] = ()) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and structure. Dataclasses are opened, and other objects with tensors in their attributes, also those
    whose classes nobody registered with torch. Objects that are `known`, by identity, stay closed."""
    leaves, spec = pytree.tree_flatten(tree, (lambda value: id(value) in known) if known else None)
    closed = {
        type(leaf): leaf
        for leaf in leaves
        if type(leaf) not in _LEAVES and not isinstance(leaf, Tensor) and id(leaf) not in known
    }
    closed = {cls: leaf for cls, leaf in closed.items() if _opens(leaf)}
    for cls in closed:
        if dataclasses.is_dataclass(cls):
            pytree.register_dataclass(cls)
        else:
            pytree.register_pytree_node(cls, _attributes, functools.partial(_object, cls))
    if not closed:
        return leaves, spec
    return flatten(tree, known)


def flat_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | None:
    """What `flatten((args, kwargs))` gives where no argument is a container or an object; None where one is. Most calls
    are so, and this takes a tenth of the time."""
    leaves = [*args, *kwargs.values()]
    return leaves if all([type(leaf) in _LEAVES or isinstance(leaf, Tensor) for leaf in leaves]) else None


_LEAVES = frozenset(
    {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Tensor, nn.Parameter}
)


def _opens(leaf: Any) -> bool:
    if dataclasses.is_dataclass(leaf):
        return not isinstance(leaf, type)
    if is_cache(leaf):
        return True
    return hasattr(leaf, "__dict__") and not callable(leaf) and not isinstance(leaf, Enum) and holds_tensors(leaf)


def _attributes(value: Any) -> tuple[list[Any], Any]:
    return list(vars(value).values()), tuple(vars(value))


def _object(cls: type, values: Iterable[Any], names: Any) -> Any:
    made: Any = object.__new__(cls)
    vars(made).update(zip(names, values, strict=True))
    return made


def opaque(arguments: Any) -> list[tuple[str, Any]]:
    """The objects among the arguments that pytree does not open, by name: the program is for these very objects.

    Raises CaptureError for an array, whose values would become part of the program.
    """
    objects: list[tuple[str, Any]] = []
    for index, leaf in enumerate(flatten(arguments)[0]):
        if isinstance(leaf, np.ndarray):
            raise CaptureError(
                f"input {index} is a NumPy array of shape {leaf.shape}, whose values would be burned into the program: "
                "pass a tensor, torch.from_numpy(array)"
            )
        if type(leaf) not in _LEAVES and not isinstance(leaf, Tensor):
            objects.append((f"input {index}", leaf))
    return objects


def refuse_unplain(leaves: Iterable[Any]) -> None:
    """Raise RankError for an input that no program takes (a nested tensor, or one of a transform such as vmap)."""
    refuse_transforms((f"input {index}", leaf) for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor))


def refuse_foreign(constant: Tensor, places: Sequence[Location]) -> None:
    """Raise CaptureError for a tensor with a gradient that is no parameter of the model: its gradient would be lost.
    It stands in the `places`, of which there may be none."""
    if not constant.requires_grad:
        return
    what = f"{places[0]}, a tensor" if places else "a tensor"
    if constant.is_leaf:
        raise CaptureError(
            f"the program uses {what} of shape {tuple(constant.shape)} that requires a gradient, and is neither an "
            "input nor a parameter of the model: make it one, or shard the module that owns it"
        )
    raise CaptureError(
        f"forward reads {what} of shape {tuple(constant.shape)} through which backward would go on to an earlier call, "
        "and a compiled backward ends where its call begins: keep it detached (detach()), or return it from one call "
        "and pass it to the next"
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


def refuse_promoted(nodes: Iterable[fx.Node], origins: Mapping[fx.Node, Origin]) -> None:
    """Raise CaptureError for floating numbers made of integers under a default dtype that forward has set: when the
    program runs, there is another one."""
    default = torch.get_default_dtype()
    for node in nodes:
        value = node.meta.get("val")
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()) or not isinstance(value, Tensor):
            continue
        operands = [one.meta.get("val") for one in node.all_input_nodes]
        whole = all(isinstance(one, Tensor) and not (one.is_floating_point() or one.is_complex()) for one in operands)
        if value.is_floating_point() and value.dtype != default and whole and "dtype" not in node.kwargs:
            place = ", ".join(part for part in (origins[node].module, origins[node].source) if part)
            raise CaptureError(
                f"{node.target} ({place}) makes {value.dtype} of integers under a default dtype that forward has set "
                f"(it was {default}): convert the integers first, with .to({value.dtype})"
            )


def refuse_seeded(
    nodes: Iterable[fx.Node], origins: Mapping[fx.Node, Origin], after_seed: Collection[tuple[str, str]]
) -> None:
    """Raise CaptureError for a draw that follows a seed set in forward, but was not made while the model was traced."""
    for node in nodes:
        place = origins[node]
        draws = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if draws and (place.module, place.source) in after_seed:
            raise CaptureError(
                f"{name_of(node.target)} ({place.source}) draws after forward has set the seed of torch's generator: "
                "set the seed outside of the model, or draw there with torch.rand or torch.randn"
            )


def call_key(leaves: list[Any], dynamic: Mapping[int, Collection[int]] | None = None) -> tuple[Any, ...]:
    """What a captured program depends on besides the model and what its code reads (see guards.guards): the
    inputs but for the values of tensors, their sizes and ints, and the global switches of torch. Of sizes it tells
    those of zero and one, which broadcast, unless the dim is `dynamic`; of ints those below two."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    refuse_unplain(leaves)
    free = dynamic or {}
    inputs = tuple(
        (int, "any") if type(leaf) is int and leaf > 1 else _leaf_key(leaf, free.get(index, ()))
        for index, leaf in enumerate(leaves)
    )
    casts = tuple(
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")
    )
    exact = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    return torch.is_grad_enabled(), casts, torch.get_default_dtype(), exact, inputs, shared_memory(tensors)


def shared_memory(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Which of some tensors lie in the memory of another, and then which are the same object; () of one tensor."""
    if len(tensors) < 2:
        return ()
    first: dict[int, int] = {}
    twice = tuple([first.setdefault(memory_of(tensor), i) for i, tensor in enumerate(tensors)])
    # code may ask whether two of them are one
    return twice if len(first) == len(tensors) else (*twice, *same_tensors(tensors))


def same_tensors(tensors: Iterable[Any]) -> tuple[int, ...]:
    """For each value the position of the first that is the same object."""
    first: dict[int, int] = {}
    return tuple([first.setdefault(id(tensor), index) for index, tensor in enumerate(tensors)])


def memory_of(tensor: Tensor) -> int:
    """What tells whether two tensors share their memory."""
    return tensor.untyped_storage()._cdata if type(tensor) in (Tensor, nn.Parameter) else id(tensor)


def refuse_shared(written: Collection[str], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise CaptureError if one of the `written` tensors shares its memory with another: what is written to one would
    not be seen in the other."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors:
        names.setdefault(memory_of(tensor), []).append(name)
    for together in names.values():
        for name in together if len(together) > 1 else ():
            if name in written:
                other = next(one for one in together if one != name)
                raise CaptureError(
                    f"forward writes in place to {name}, which shares its memory with {other}: a sharded program holds "
                    "them apart. Write to one tensor only, and take views of it in forward"
                )


def _order(tensor: Tensor) -> tuple[tuple[int, bool, bool], ...]:
    """How a tensor lies in memory whatever its sizes are: the dims from major to minor, whether each repeats one
    element, and whether its elements lie side by side. That decides which views it has."""
    dims = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    sizes, strides = tensor.shape, tensor.stride()
    within = [*(strides[dim] * sizes[dim] for dim in dims[1:]), 1]
    return tuple([(dim, strides[dim] == 0, strides[dim] == size) for dim, size in zip(dims, within, strict=True)])


def _leaf_key(leaf: Any, free: Collection[int]) -> Any:
    if isinstance(leaf, Tensor):
        shape = tuple("any" if size > 1 or dim in free else size for dim, size in enumerate(leaf.shape))
        # results are laid out in memory as operands are, and eager mode draws random numbers in the order of memory
        order = None if leaf.is_contiguous() else _order(leaf)
        facts = type(leaf) is nn.Parameter, tuple((name, _leaf_key(vars(leaf)[name], ())) for name in vars(leaf))
        return shape, leaf.dtype, leaf.requires_grad, order, facts if any(facts) else None
    if isinstance(leaf, (int, float, complex, slice)) or type(leaf).__hash__ is None:
        return type(leaf), repr(leaf)
    return type(leaf), leaf if isinstance(leaf, (*PLAIN, Enum)) else Itself(leaf)
