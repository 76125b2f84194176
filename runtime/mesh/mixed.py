"""Plain tensors and DTensors in one operation: it runs on whole tensors on every rank, as on one device.

    model[0](x)                               x is plain, the weight a DTensor: the weight is gathered, the result plain
    head(model(x))                            the same with a plain head; it gets its whole gradient on every rank
    loss + model[0].weight.square().sum()     a plain loss, a DTensor's sum
    weight.copy_(plain)                       written in place: the plain tensor is cut (rank 0's values)
    clip_grad_norm_([*sharded, *plain], 1.0)  lists: nothing is gathered, plain members count as whole on every rank

torch itself refuses to mix them. Gathering costs what `full_tensor()` costs; nobody pays who does not mix. What DTensor
gets wrong without any mixing stands in `dtensor_gaps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from shardc.runtime.mesh import dtensor_gaps, local_steps
from shardc.runtime.mesh.agreement import meeting
from shardc.runtime.mesh.dtensor_gaps import gathered

_RAW: Mapping[Any, Callable[..., Any]] = {
    **{function: function for function in (torch.autograd.grad, Tensor.backward, Tensor.register_hook)},
    Tensor.__deepcopy__: dtensor_gaps.deepcopied,
    Tensor.__reduce_ex__: dtensor_gaps.pickled,
}
"""They must get the very objects; and what runs in their place."""
_WRONG_IN_DTENSOR = frozenset(
    (F.mse_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.huber_loss, F.smooth_l1_loss)
)
"""With a mean over split operands, DTensor multiplies their gradients by the number of ranks (torch 2.13)."""


def install() -> None:
    """Let DTensors mix with plain tensors in this process. Once is enough.

    The class itself is changed, since gradients and results of operations are of this class whatever we do; and the
    class whose objects wait for DTensor's collectives, so that a lost rank is told of. Before a step of an optimizer,
    what it holds for a DTensor becomes one.
    """
    global _installed
    if not _installed:
        _installed = True
        DTensor.__torch_function__ = classmethod(_torch_function)  # type: ignore[assignment]
        for name in ("trigger_wait", "wait"):
            setattr(AsyncCollectiveTensor, name, _telling(getattr(AsyncCollectiveTensor, name)))
        register_optimizer_step_pre_hook(lambda optimizer, *_: _distribute_states(optimizer))
        local_steps.install()


def _telling(wait: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """`wait` for what DTensor sends of itself: in `clip_grad_norm_`, optimizers, `full_tensor`, `redistribute`."""

    @wraps(wait)
    def telling(tensor: Any) -> Tensor:
        with meeting("a collective of a DTensor"):
            return wait(tensor)

    return telling


_AsTorch = torch._C.DisableTorchFunctionSubclass
_installed = False


def _distribute_states(optimizer: Any) -> None:
    with _AsTorch():
        for parameter, state in optimizer.state.items():
            if isinstance(parameter, DTensor) and isinstance(state, dict):
                _distribute_state(parameter, state)  # pyright: ignore[reportUnknownArgumentType]


def _distribute_state(parameter: DTensor, state: dict[Any, Any]) -> None:
    """What was loaded from a checkpoint of one device is plain."""
    for key, value in state.items():
        plain = isinstance(value, Tensor) and not isinstance(value, DTensor)
        if plain and value.ndim and value.shape == parameter.shape:
            state[key] = _like(parameter, value)


def _torch_function(
    cls: type, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Any:
    with _AsTorch():
        if getattr(func, "__name__", "") == "__get__":
            return func(*args)  # attributes, which must be fast
        kwargs = kwargs or {}
        if func in _RAW:
            return _RAW[func](*args, **kwargs)
        if dtensor_gaps.reads(func):
            return func(*map(gathered, args), **kwargs)
        values = (*args, *kwargs.values())
        if not (func in _WRONG_IN_DTENSOR or _any_foreign(values) or _sets_plain(func, values)):
            return dtensor_gaps.run(func, args, kwargs)
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        return _mixed(func, leaves, spec, next(leaf for leaf in leaves if isinstance(leaf, DTensor)))


def _sets_plain(func: Callable[..., Any], values: Sequence[Any]) -> bool:
    """Whether a DTensor is written to a plain tensor, or to `.data`, which DTensor ignores."""
    plain = isinstance(values[0], Tensor) and not isinstance(values[0], DTensor)
    return func == Tensor.data.__set__ or (plain and dtensor_gaps.writes(func))  # type: ignore[attr-defined]


def _any_foreign(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if _foreign(value):
                return True
        elif isinstance(value, (list, tuple)) and _any_foreign(value):  # pyright: ignore[reportUnknownArgumentType]
            return True
    return False


def _foreign(tensor: Tensor) -> bool:
    """Whether DTensor's own operations would refuse a tensor, or give it a DTensor for a gradient."""
    return not isinstance(tensor, DTensor) and (tensor.ndim > 0 or tensor.requires_grad)


def _mixed(func: Callable[..., Any], leaves: list[Any], spec: pytree.TreeSpec, like: DTensor) -> Any:
    name = getattr(func, "__name__", "")
    written = leaves[0] if dtensor_gaps.writes(func) else None
    if name == "__set__":
        return _set(func, *leaves)
    if name.startswith("_foreach_") or isinstance(written, DTensor):
        args, kwargs = pytree.tree_unflatten([_spread(leaf, like, first=name == "copy_") for leaf in leaves], spec)
        return dtensor_gaps.run(func, args, kwargs)
    return dtensor_gaps.on_whole_tensors(func, *pytree.tree_unflatten(leaves, spec))


def _spread(leaf: Any, like: DTensor, first: bool = False) -> Any:
    """A plain tensor, the same on every rank, as a DTensor on the mesh of `like`; with `first`, rank 0's values."""
    if not isinstance(leaf, Tensor) or isinstance(leaf, DTensor) or not leaf.ndim:
        return leaf
    mesh = like.device_mesh
    leaf = leaf.to(mesh.device_type)
    if first:
        leaf = leaf.detach().clone(memory_format=torch.contiguous_format)
        with meeting("the broadcast of rank 0's values"):
            torch.distributed.broadcast(leaf, 0)
    return DTensor.from_local(leaf, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _like(parameter: DTensor, value: Tensor) -> DTensor:
    """A tensor of rank 0's as a DTensor that lies like the parameter."""
    stored: Any = torch.empty_like(parameter.detach(), dtype=value.dtype)
    with torch.no_grad():
        return stored.copy_(_spread(value, parameter, first=True))


def _set(func: Any, target: Any, value: Any) -> None:
    """`parameter.grad = plain`, `parameter.data = plain`."""
    if isinstance(target, DTensor) and isinstance(value, Tensor):
        value = value if isinstance(value, DTensor) else _like(target, value)
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            target._local_tensor, target._spec = value._local_tensor, value._spec  # all that a DTensor is
            return
    else:
        value = gathered(value)
    func(target, value)
