"""Shape inference: what an operator makes of operands of given shapes and dtypes, without their data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from shardc.ir.argument_keys import key_of

aten = torch.ops.aten
Wrong = TypeVar("Wrong")


class Described(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Failure(NamedTuple):
    """Why an operator cannot run on such operands."""

    reason: str


Inferred = Described | tuple["Described | None", ...] | Failure | None
"""One result, several, or that the operator refuses; None where this cannot be told."""


def disagreements(
    node: fx.Node,
    described: Callable[[fx.Node], Described | None],
    device: torch.device,
    compared: Callable[[Inferred], Iterable[Wrong]],
) -> list[Wrong]:
    """What `compared` finds wrong with what a call makes on a device, when its operands are as `described`. Calls of
    one form are inferred once.

    Meta kernels are asked first, which takes a tenth of the time that fake tensors take. On a device, some operators
    make other shapes; so fake tensors have the last word.
    """
    wrong: list[Wrong] = []
    for infer in (_by_meta_kernel, _by_fake_tensors):
        wrong = list(compared(_inferred(infer, node, described, device)))
        if not wrong:
            break
    return wrong


def _inferred(
    infer: Callable[[OpOverload, Any, torch.device], Inferred],
    node: fx.Node,
    described: Callable[[fx.Node], Described | None],
    device: torch.device,
) -> Inferred:
    if not isinstance(node.target, OpOverload):
        return None
    try:
        return infer(node.target, key_of((node.args, node.kwargs), described), device)
    except TypeError as error:
        if "unhashable" in str(error):
            return None
        raise


class _Unknown(Exception):
    """An operand that nothing is known of."""


def _made(key: Any, device: torch.device) -> Any:
    """The argument of which this is the key, with tensors that have no data. What is made on a device is made there."""
    if isinstance(key, Described):
        return torch.empty(key.shape, dtype=key.dtype, device=device)
    if key is None:
        raise _Unknown
    kind, *items = key
    if kind == "list":
        return [_made(item, device) for item in items]
    if kind == "dict":
        return {name: _made(item, device) for name, item in items}
    return device if isinstance(items[1], torch.device) else items[1]


@lru_cache(maxsize=1)
def _mode() -> FakeTensorMode:
    return FakeTensorMode()


@lru_cache(maxsize=1 << 14)
def _by_meta_kernel(target: OpOverload, key: Any, device: torch.device) -> Inferred:
    if _reads_a_tensor(key):  # else it might be made on a device for real
        with suppress(Exception), torch.no_grad():
            args, kwargs = _made(key, torch.device("meta"))
            return _described(_function(target)(*args, **kwargs))
    return _by_fake_tensors(target, key, device)


@lru_cache(maxsize=1 << 14)
def _by_fake_tensors(target: OpOverload, key: Any, device: torch.device) -> Inferred:
    try:
        with torch.no_grad(), _mode():
            args, kwargs = _made(key, device)
            return _described(_function(target)(*args, **kwargs))
    except (_Unknown, NotImplementedError, DataDependentOutputException, DynamicOutputShapeException):
        return None
    except Exception as error:
        return Failure(str(error).partition("\n")[0])


def _function(target: OpOverload) -> OpOverload:
    """A rank's part need not have the strides that a view of the global tensor relies on: generated code reshapes."""
    return aten.reshape.default if target is aten.view.default else target


def _reads_a_tensor(key: Any) -> bool:
    return isinstance(key, Described) or (isinstance(key, tuple) and any(map(_reads_a_tensor, key)))  # pyright: ignore[reportUnknownArgumentType]


def _described(made: Any) -> Any:
    if isinstance(made, torch.Tensor):
        return Described(tuple(made.shape), made.dtype)
    return tuple(_described(one) if isinstance(one, torch.Tensor) else None for one in made)
