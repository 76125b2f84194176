"""`type(x)` in a trace: that of one device, where the trace has an object of another class in its place.

type(self) is Model       # True, though the object that was sharded is of a subclass
type(x) is torch.Tensor   # True, though a trace has tensors of its own
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from shardc.capture.side_effects.holders import Holder, Names
from shardc.capture.side_effects.readings import Reading
from shardc.capture.side_effects.stand_ins import Counter
from shardc.capture.torch_patches.fake_tensors import is_traced
from shardc.ir.model_call import unsharded


def type_of(value: Any) -> type:
    """The class of an object on one device."""
    if is_traced(value):
        return nn.Parameter if isinstance(value, nn.Parameter) else Tensor
    if type(value) in (Counter, Reading):
        return type(value.value)
    return unsharded(type(value))


class _Type(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return type_of(args[0]) if len(args) == 1 and not kwargs else type(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, type)

    def __subclasscheck__(cls, value: Any) -> bool:
        return issubclass(value, type)


class TypeOf(metaclass=_Type):
    """Stands for `type` in the globals of code that asks."""

    def __class_getitem__(cls, item: Any) -> Any:
        return type[item]


def answer_types(holders: Iterable[Holder]) -> None:
    """Let the user's code ask for types here; what the holders held before is to be put back by the caller."""
    for holder in holders:
        if isinstance(holder, Names) and isinstance(holder.target, dict) and "type" in holder.used:
            holder.target.setdefault("type", TypeOf)
