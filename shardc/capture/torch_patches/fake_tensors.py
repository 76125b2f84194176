"""Fake tensors: shapes, strides and dtypes without values, on which the model runs while it is traced."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

# `mode.from_tensor` names every symbolic size after a source; this one needs no Python frame that the size came from.
from torch._dynamo.source import ConstantSource

# torch has no public fake tensors: torch.export makes them of its own inputs, and gives no mode to make more.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
    statically_known_true,
)
from torch.utils._python_dispatch import _disable_current_modes  # torch has no public way out of a trace

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
"""What fake tensors raise where the program asks for a value that only a run would know."""


MOST_KNOWN = 1 << 14
"""Calls whose results fake modes remember, 3 KB each. A small model adds fifty."""


def fake_mode(dynamic: bool = False) -> FakeTensorMode:
    """A mode that makes fake tensors; their shapes may hold symbols if `dynamic`. Real tensors that the program made
    itself (constants) may meet them."""
    # All modes of a process share what they know of operators, which would grow with every model that is compiled.
    if FakeTensorMode.cache_info().size > MOST_KNOWN:
        FakeTensorMode.cache_clear()
    if not dynamic:
        return FakeTensorMode(allow_non_fake_inputs=True)
    # dims that happen to have one size in this call have symbols of their own, unless they are said to be equal
    env = ShapeEnv(duck_shape=False)
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=env, static_shapes=False)


def fake_like(mode: FakeTensorMode, tensor: torch.Tensor) -> FakeTensor:
    """A fake CPU tensor with shape, strides and dtype of `tensor`, which may be on meta; nothing is allocated."""
    # `mode.from_tensor` would keep the device, and a model on meta or cuda is traced as one on the CPU
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, empty, torch.device("cpu"))


def fake_dynamic(mode: FakeTensorMode, tensor: torch.Tensor, dims: Iterable[int], name: str) -> FakeTensor:
    """Like `fake_like`, with symbols for the sizes of `dims`."""
    chosen = set(dims)
    kinds = [DimDynamic.DYNAMIC if dim in chosen else DimDynamic.STATIC for dim in range(tensor.ndim)]
    real = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return mode.from_tensor(
        real, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds), source=ConstantSource(name)
    )


def fake_number(mode: FakeTensorMode, number: int, name: str) -> FakeTensor:
    """A fake tensor whose size is a symbol for a number of the call, from 2 on: torch has symbols for sizes only."""
    return fake_dynamic(mode, torch.empty(1, dtype=torch.uint8, device="meta").expand(number), (0,), name)


def is_fake(value: Any) -> bool:
    """Whether a value is a fake tensor."""
    return isinstance(value, FakeTensor)


def is_traced(value: Any) -> bool:
    """Whether a tensor is one of a trace: what user code sees of a fake tensor is wrapped once more."""
    return isinstance(value, (FakeTensor, FunctionalTensor))


@contextmanager
def attributes_noted(note: Callable[[torch.Tensor, str], None]) -> Generator[None]:
    """In here, `note` is called with a tensor of the trace and the name of an attribute that is set on it."""

    def assigned(tensor: FunctionalTensor, name: str, value: Any) -> None:
        object.__setattr__(tensor, name, value)
        if name != "elem" and not hasattr(FunctionalTensor, name):
            note(tensor, name)

    with patch.object(FunctionalTensor, "__setattr__", assigned):
        yield


@contextmanager
def untraced() -> Generator[None]:
    """Compute with real tensors in here, in the middle of a trace."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def require_equal(one: int | torch.SymInt, other: int | torch.SymInt) -> None:
    """Make a guard of "these sizes are equal", so that the trace uses one symbol for both."""
    torch._check(one == other)  # `assert` would ask for the answer, and fix the symbols to the sizes of this call


def same_shape(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are equal whatever their symbols stand for. The question adds no guard to the trace."""
    return len(one) == len(other) and all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))


def is_data_dependent(error: BaseException) -> bool:
    """Whether a trace failed because the program looked at the values of its tensors."""
    # some operators raise a plain RuntimeError, which only its words tell from others
    return isinstance(error, DATA_DEPENDENT) or "Cannot call item()" in str(error) or "data-dependent" in str(error)
