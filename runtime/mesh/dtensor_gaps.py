"""What DTensor gets wrong in the hands of users, or does not do: there it runs on whole tensors on every rank.

    weight.grad.norm().item()     DTensor leaves the norm in parts, and `item` gives this rank's: it is reduced at once
    f"{norm:.3f}", weight.tolist(), weight.numpy()      DTensor refuses
    torch.allclose(a, b), weight[mask], weight.fill_diagonal_(0), norms.square_()      as well
    weight[0].zero_(), weight[2, 3] = 0, out=weight     DTensor writes to a copy: the whole is written, and cut again

    copy.deepcopy(weight.grad), torch.save(weight.grad, f)          as well, where the part is a view into a bucket

Ranks run the same program, so what fails by the layout of an operand fails on all of them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
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
_WRONG_WRITES = frozenset((Tensor.__setitem__, Tensor.index_add_, Tensor.index_copy_, Tensor.scatter_add_))
"""DTensor writes to a copy, or leaves this rank with a part of another size, without an error (torch 2.13)."""
_NO_VALUES = frozenset(
    f"{name}_"
    for name in (
        "requires_grad", "detach", "share_memory", "rename", "unsqueeze", "squeeze", "t", "transpose", "swapaxes",
        "swapdims", "resize", "resize_as", "set", "as_strided",
    )
)  # fmt: skip
"""Methods that change what a tensor is, and no values."""
_WRITE_STATISTICS = frozenset((F.batch_norm, F.instance_norm))
"""They write to arguments 1 and 2, of which their versions do not tell."""
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
    elsewhere = kwargs.get("out") is not None or func in _WRITE_STATISTICS
    if elsewhere or (writes(func) and _would_lose(func, _first(args, kwargs))):
        return on_whole_tensors(func, args, kwargs)
    try:
        result = func(*args, **kwargs)
    except RuntimeError as error:
        if isinstance(error, ShardcError) or not _OF_PARTS.search(str(error)):
            raise
        return on_whole_tensors(func, args, kwargs)
    if type(result) is DTensor:
        return _reduced(result)
    return _reduced_list(result) if func in _LISTS_OF_NORMS else result


def writes(func: Callable[..., Any]) -> bool:
    """Whether a method writes values to its first argument: `add_`, `__iadd__`, `__setitem__`."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__"))
    return name.endswith("_") and name not in _NO_VALUES


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return next(iter((*args, *kwargs.values())), None)  # `torch.nn.init` names all its arguments


def _would_lose(func: Callable[..., Any], written: Any) -> bool:
    """Whether DTensor would not write, or to the wrong place."""
    targets = [one for one in pytree.tree_leaves(written) if isinstance(one, DTensor)]
    if func in _WRONG_WRITES and any(not isinstance(p, Replicate) for one in targets for p in one.placements):
        return True
    return any(_has_other_memory(one) for one in targets)


def _has_other_memory(view: Any) -> bool:
    """Whether a view is a copy: `weight[0]` of rows of which each rank has some is gathered first."""
    if not view._is_view() or not isinstance(view._base, DTensor):
        return False
    mine, whole = (one._local_tensor.untyped_storage()._cdata for one in (view, view._base))
    return mine != whole and view._spec.placements != view._base._spec.placements  # pyright: ignore


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


def on_whole_tensors(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`func` with every DTensor gathered, and with what it writes to written back."""
    written = [_first(args, kwargs) if writes(func) else None, kwargs.get("out")]
    if func in _WRITE_STATISTICS:
        written += [*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")]
    named = set(map(id, pytree.tree_leaves(written)))
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    bases: dict[tuple[int, bool], Tensor] = {}
    wholes = {id(one): _Whole(one, id(one) in named, bases) for one in leaves if isinstance(one, DTensor)}
    args, kwargs = pytree.tree_unflatten([wholes[id(one)].value if id(one) in wholes else one for one in leaves], spec)
    result = func(*args, **kwargs)
    for one in wholes.values():
        one.write_back()
    theirs = {id(one.value): one.tensor for one in wholes.values() if one.named}
    return pytree.tree_map(lambda made: theirs.get(id(made), made), result) if theirs else result


class _Whole:
    """A DTensor as the whole tensor on every rank. `named`: the function is known to write to it. Of a view with other
    memory than its base, the base is gathered, once for all its views, and `value` is the same view of that."""

    def __init__(self, tensor: Any, named: bool, bases: dict[tuple[int, bool], Tensor]) -> None:
        self.tensor, self.named = tensor, named
        self.base = tensor._base if named and _has_other_memory(tensor) else tensor
        self.recorded = torch.is_grad_enabled() and named
        key = id(self.base), named
        if key not in bases:
            whole = self.base.full_tensor()
            bases[key] = whole.clone() if self.recorded else whole  # which autograd does not let be written to
        self.whole = bases[key]
        self.value: Tensor = self.whole if self.base is tensor else tensor._view_func_unsafe(self.whole)
        self.version = _version(self.whole)

    def write_back(self) -> None:
        """Write what the function has written."""
        if self.named or _version(self.whole) != self.version:
            _write_back(self.base, self.whole, self.recorded)
            if self.base is not self.tensor:
                _write_back(self.tensor, self.value, False)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _write_back(target: Any, whole: Tensor, recorded: bool) -> None:
    """The values of a whole tensor, the same on every rank, for a DTensor. One in parts becomes whole. `recorded`: with
    the gradients of what they were computed of."""
    with torch.set_grad_enabled(recorded and whole.requires_grad):
        mesh, placements = target.device_mesh, target.placements
        given = whole if torch.is_grad_enabled() else whole.detach()
        value: Any = DTensor.from_local(given, mesh, [Replicate()] * mesh.ndim, run_check=False)
        if torch.is_grad_enabled():
            target.copy_(value.redistribute(placements=placements))
        elif any(isinstance(one, Partial) for one in placements):
            target._local_tensor, target._spec = value._local_tensor, value._spec  # all that a DTensor is
        else:
            target._local_tensor.copy_(value.redistribute(placements=placements)._local_tensor)
            if not target.is_inference():
                increment_version(target)
