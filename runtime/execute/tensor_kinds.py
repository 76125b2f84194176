"""Whether tensors are of the kinds that somebody has looked at: one call into torch for all of them.

known = TensorKinds(tensors)     # all were looked at, one by one
known.fit(others)                # True: each has the class, dtype, device and shape of the one before, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# What torch.compile checks before every call. torch has no public way to ask as much of many tensors at once.
from torch._C._dynamo.guards import TensorGuards  # pyright: ignore


class TensorKinds:
    """The class, the kind of storage (dense, sparse, nested, of a transform), dtype, device, shape and `requires_grad`
    of some tensors, and which of them are the same object (as labels often are the input)."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._number = len(tensors)
        self._places = _places(tensors)
        tensors = _once(tensors, self._places)
        # whose types torch gives wrongly: there is a list for each tensor
        shapes: Any = [list(tensor.shape) for tensor in tensors]
        strides: Any = [[None] * len(shape) for shape in shapes]
        with torch.enable_grad():  # without gradients no tensor seems to require one
            self._guards = TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)

    def fit(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors are of the same kinds. May be False for some that are, in another mode of torch."""
        with torch._C.DisableTorchFunction():
            try:
                nested = any(map(_IS_NESTED, tensors))  # at one of these torch's check ends the process
            except TypeError:  # no tensor
                return False
        same = not nested and len(tensors) == self._number and _places(tensors) == self._places
        return same and self.kept(tensors)

    def kept(self, tensors: Sequence[Tensor]) -> bool:
        """The same for the very tensors that this was made of, in half the time."""
        given = _once(tensors, self._places)
        before = torch.is_grad_enabled()
        with torch._C.DisableTorchFunction():
            torch._C._set_grad_enabled(True)  # as `torch.enable_grad` does, which takes longer than the check
            try:
                return bool(self._guards.check(*given))
            finally:
                torch._C._set_grad_enabled(before)


def _places(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor comes first, if some come twice; else nothing."""
    numbers = list(map(id, tensors))
    return [] if len(set(numbers)) == len(numbers) else [numbers.index(number) for number in numbers]


def _once(tensors: Sequence[Tensor], places: Sequence[int]) -> Sequence[Tensor]:
    """Each tensor once, as torch takes them."""
    if not places:
        return tensors
    return [tensor for at, (place, tensor) in enumerate(zip(places, tensors, strict=True)) if at == place]


_IS_NESTED = Tensor.is_nested.__get__  # type: ignore[attr-defined]
