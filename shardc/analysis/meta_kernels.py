"""What torch's meta kernels make of tensors in memory: which results are views, and how results are laid out.

    made(aten.t.default, [x], {}, (4096,))     one form: operand 0, shape [16, 64], stride [1, 16]

A meta kernel computes nothing, but goes through many lines of Python. So a call of one form is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from shardc.analysis.storages import TensorForm, form_of
from shardc.ir.argument_keys import key_of

aten = torch.ops.aten
Placed = tuple[int, TensorForm]
"""An operand: the position of its storage among those of the call, and its form within it."""


def made_by_meta_kernel(
    node: fx.Node, placed: Callable[[fx.Node], Placed | None], sizes: tuple[int, ...]
) -> list[TensorForm | None] | None:
    """The forms of the results of a call, whose operands lie in storages of `sizes` bytes as `placed` says; None where
    there is no meta kernel, or where it asks for values."""
    assert isinstance(node.target, OpOverload)
    args, kwargs = key_of(node.args, placed), key_of(dict(node.kwargs), placed)
    try:
        hash((args, kwargs))
    except TypeError:  # sizes that are symbols
        return _made.__wrapped__(node.target, args, kwargs, sizes)
    return _made(node.target, args, kwargs, sizes)


@lru_cache(maxsize=1 << 13)
def _made(target: OpOverload, args: Any, kwargs: Any, sizes: tuple[int, ...]) -> list[TensorForm | None] | None:
    memory = [torch.UntypedStorage(size, device="meta") for size in sizes]
    # _cdata: Python makes a new object for a storage whenever it is asked; this number of it stays
    numbers = {storage._cdata: number for number, storage in enumerate(memory)}
    given: Sequence[Any] = _argument(args, memory)
    named: Mapping[str, Any] = _argument(kwargs, memory)
    if "device" in named:
        named = {**named, "device": torch.device("meta")}
    function = aten.reshape.default if target is aten.view.default else target
    try:
        result = function(*given, **named)
    except (RuntimeError, TypeError):  # as kernels say so (NotImplementedError is a RuntimeError)
        return None
    results = result if isinstance(result, (list, tuple)) else [result]
    return [form_of(one, numbers) for one in results]


def _argument(key: Any, memory: Sequence[torch.UntypedStorage]) -> Any:
    """The argument of which this is the key."""
    if key is None:
        return None
    kind, *items = key
    if kind == "list":
        return [_argument(item, memory) for item in items]
    if kind == "dict":
        return {name: _argument(item, memory) for name, item in items}
    if kind == "plain":
        return items[1]
    return _tensor(memory[kind], items[0])


def _tensor(storage: torch.UntypedStorage, form: TensorForm) -> Tensor:
    empty = torch.empty(0, dtype=form.dtype, device="meta")
    return empty.set_(storage, form.offset, form.shape, form.stride)  # pyright: ignore
