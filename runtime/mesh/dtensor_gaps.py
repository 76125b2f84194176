"""What DTensor gets wrong in the hands of users, or does not do: there it runs on whole tensors on every rank.

    weight.grad.norm().item()     DTensor leaves the norm in parts, and `item` gives this rank's: it is reduced at once
    f"{norm:.3f}", weight.tolist(), weight.numpy()      DTensor refuses
    torch.allclose(a, b), weight[mask], weight.fill_diagonal_(0), norms.square_()      as well

    copy.deepcopy(weight.grad), torch.save(weight.grad, f)          as well, where the part is a view into a bucket

Ranks run the same program, so what fails by the layout of an operand fails on all of them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Partial
from torch.utils import _pytree as pytree

from shardc.runtime.errors import ShardcError

READ = frozenset({"item", "tolist", "numpy", "__array__", "__format__", "__contains__"}) | frozenset(
    f"__{kind}__" for kind in ("bool", "int", "index", "float", "complex")
)
"""Functions that make Python values of a tensor: DTensor makes them of the rank's part, or refuses."""

COMPLAINTS = re.compile("DTensor|[Ss]hard|tensor subclass|redistribut")
"""What tells an error of DTensor from one that the user would have got on one device."""

_OF_PARTS = re.compile(COMPLAINTS.pattern + "|is invalid for input of size")
"""The same where the user's own error may be told after all: also what a view of a rank's part says."""

_LISTS_OF_NORMS = frozenset((torch._foreach_norm,))  # pyright: ignore[reportPrivateImportUsage]
_READERS = frozenset(getattr(Tensor, name) for name in READ)


def reads(func: Callable[..., Any]) -> bool:
    """Whether a function makes a Python value of its first argument."""
    return func in _READERS


def gathered(value: Any) -> Any:
    """A DTensor as the whole tensor, which every rank must call for; all else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def deepcopied(tensor: Any, memo: dict[int, Any]) -> Any:
    """What `copy.deepcopy` makes of a DTensor: as of a plain tensor, with its gradient; a parameter leaves that."""
    if id(tensor) in memo:
        return memo[id(tensor)]
    if not tensor.is_leaf:
        return Tensor.__deepcopy__(tensor, memo)  # which refuses it
    memo[id(tensor)] = made = _with_own_memory(tensor)
    if tensor.grad is not None and not isinstance(tensor, nn.Parameter):
        made.grad = copy.deepcopy(tensor.grad, memo)
    vars(made).update(copy.deepcopy(vars(tensor), memo))
    return made


def pickled(tensor: Any, protocol: Any) -> Any:
    """What pickle and `torch.save` ask a DTensor for."""
    if tensor._local_tensor.storage_offset():
        view, tensor = tensor, _with_own_memory(tensor)
        vars(tensor).update(vars(view))
    return Tensor.__reduce_ex__(tensor, protocol)


def _with_own_memory(tensor: Any) -> Any:
    with torch.no_grad():
        return DTensor(tensor._local_tensor.clone(), tensor._spec, requires_grad=tensor.requires_grad)  # pyright: ignore


def run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`func` as DTensor does it, with what it should not leave in parts reduced; on whole tensors where it cannot."""
    try:
        result = func(*args, **kwargs)
    except RuntimeError as error:
        if isinstance(error, ShardcError) or not _OF_PARTS.search(str(error)):
            raise
        return _on_whole_tensors(func, args, kwargs)
    if type(result) is DTensor:
        return _reduced(result)
    return _reduced_list(result) if func in _LISTS_OF_NORMS else result


def _reduced(value: DTensor) -> DTensor:
    """One element is reduced where every rank is, since who reads it may be one rank alone (`if rank == 0:
    print(norm)`). So is what is no sum: DTensor adds up norms of parts as if they were norms (torch 2.13)."""
    placements = value._spec.placements  # pyright: ignore[reportPrivateUsage]
    parts = [one for one in placements if isinstance(one, Partial)]
    return _whole(value) if parts and (value.numel() == 1 or not all(map(_is_sum, parts))) else value


def _whole(value: DTensor) -> DTensor:
    whole = [Replicate() if isinstance(one, Partial) else one for one in value.placements]
    return value.redistribute(placements=whole)


def _reduced_list(values: Any) -> Any:
    """Norms of many tensors, reduced together where they have one type."""
    if all(type(one) is DTensor for one in values) and len({one.dtype for one in values}) == 1:
        together: Any = torch.stack(values)
        return type(values)(_whole(together).unbind())
    return type(values)(_reduced(one) if type(one) is DTensor else one for one in values)


def _is_sum(part: Partial) -> bool:
    return type(part) is Partial and part.reduce_op in ("sum", "avg")


def _on_whole_tensors(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    wholes = {id(leaf): (leaf, leaf.full_tensor()) for leaf in leaves if isinstance(leaf, DTensor)}
    versions = {key: whole._version for key, (_, whole) in wholes.items()}
    args, kwargs = pytree.tree_unflatten([wholes[id(one)][1] if id(one) in wholes else one for one in leaves], spec)
    result = func(*args, **kwargs)
    for key, (leaf, whole) in wholes.items():
        if whole._version != versions[key]:
            _write_back(leaf, whole)
            result = leaf if result is whole else result
    return result


def _write_back(target: Any, whole: Tensor) -> None:
    """The values of a whole tensor, the same on every rank, for a DTensor. One in parts becomes whole."""
    with torch.no_grad():
        mesh, placements = target.device_mesh, target.placements
        value: Any = DTensor.from_local(whole.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
        if any(isinstance(one, Partial) for one in placements):
            target._local_tensor, target._spec = value._local_tensor, value._spec  # all that a DTensor is
        else:
            target._local_tensor.copy_(value.redistribute(placements=placements)._local_tensor)
        increment_version(target)
