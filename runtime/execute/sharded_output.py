"""Outputs of which every rank holds a part, in the user's hands: DTensors that are used like any tensor.

logits = model(tokens).logits         each rank of tp holds some columns
logits[:, -1].argmax(-1)              as DTensor does it
logits.square().mean().item()         the mean over all ranks; a plain DTensor gives the rank's part of it
cross_entropy(logits, targets)        RankError: ... call .full_tensor() on it first
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Replicate
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from shardc.runtime.errors import RankError
from shardc.runtime.mesh.dtensor_gaps import COMPLAINTS, READ, gathered

_RIGHT = {
    functional.cross_entropy, functional.nll_loss, functional.l1_loss, functional.kl_div, functional.poisson_nll_loss,
}  # fmt: skip
_WRONG: set[object] = {
    getattr(functional, name) for name in dir(functional) if re.search("loss|cross_entropy|^conv[123]d", name)
} - _RIGHT
"""Functions whose gradients or values may be wrong on DTensors in torch 2.13, without an error. Losses that are a mean
in one kernel give gradients that are too large by the number of ranks."""


class ShardedOutput(DTensor):
    """A DTensor that tells what to call where an operator cannot work on it. What is computed of it alone is one too,
    and no sum of it stays in parts. Where that is whole on every rank, it goes with plain tensors."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = made = self.detach().clone().requires_grad_(self.requires_grad)
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        if func in _WRONG and not all(map(_is_whole, _dtensors(args, kwargs))):
            raise _needs_whole(name, "DTensor may get it wrong", args, kwargs)
        if name in READ:
            args = tree_map(gathered, args)
        try:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **kwargs)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            told = " ".join(map(str, error.args)).strip()
            if not COMPLAINTS.search(told):
                raise
            if all(_is_whole(one) for one in _dtensors(args, kwargs)):
                return func(*tree_map(gathered, args), **tree_map(gathered, kwargs))
            why = "with a plain tensor beside it" if " mixed " in told else told.splitlines()[0]
            raise _needs_whole(name, why, args, kwargs) from error
        return result if isinstance(result, torch.Size) else tree_map(_whole_sums, result)


def sharded_output(value: DTensor) -> DTensor:
    """The same tensor as one that is used like any other."""
    value.__class__ = ShardedOutput
    return value


def _dtensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[DTensor]:
    return [one for one in tree_leaves((args, dict(kwargs))) if isinstance(one, DTensor)]


def _is_whole(value: DTensor) -> bool:
    return all(isinstance(one, Replicate) for one in value.placements)


def _whole_sums(value: object) -> object:
    """A result as a sharded output, with the sums reduced that it would leave in parts."""
    if not isinstance(value, DTensor):
        return value
    if any(isinstance(one, Partial) for one in value.placements):
        whole = [Replicate() if isinstance(one, Partial) else one for one in value.placements]
        value = value.redistribute(placements=whole)
    return value if isinstance(value, ShardedOutput) else sharded_output(value)


def _needs_whole(name: str, why: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RankError:
    split = next(one for one in _dtensors(args, kwargs) if not _is_whole(one))
    return RankError(
        f"{name} cannot work on an output of which each rank holds a part, {list(split.shape)} as "
        f"{list(split.placements)}: {why}; call .full_tensor() on it first, on every rank, or ask for outputs='full'"
    )
