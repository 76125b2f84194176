"""The values that a trace has met under some keys of one holder, and how to get those that stand there now.

values = MetValues(Attributes(model.config), ["tau", "eps"], [1.0, 1e-5])
values.getter(values.target)        # (0.5, 1e-05)
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Collection, Iterable, Set
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
from torch import Tensor, nn

from shardc.capture.side_effects.holders import (
    Bytes,
    Cell,
    Contents,
    ContextValue,
    Environment,
    Holder,
    Members,
    Names,
    Slots,
    value_of_variable,
)
from shardc.capture.torch_patches.module_internals import namespace_of
from shardc.runtime.mesh.parameters import RECORD


class _Gone:
    def __repr__(self) -> str:
        return "gone"


GONE = _Gone()
"""What stands in a place where nothing does."""

NEVER_READ = frozenset({"_shardc", RECORD})
"""Attributes of shardc's own."""

call: Any = operator.call  # as a function in C; its type is that of a call of one argument


class MetValues:
    """The values that stood under some keys of one holder, and how to get those that stand there now."""

    def __init__(self, holder: Holder, keys: list[Any], values: list[Any]) -> None:
        self.holder, self.keys = holder, keys
        self.getter, self.single = _getter(holder, keys)
        self.target = plain_dict(holder)
        self.expected = values

    def take(self, contents: Contents) -> None:
        """Expect these values from now on."""
        values = [contents[key] for key in self.keys]
        self.expected = values


def _getter(holder: Holder, keys: list[Any]) -> tuple[Callable[[Any], Any], bool]:
    """A function from the holder's target to its values under `keys`, and whether it gives the bare value, of one."""
    if isinstance(holder, Members) or (
        type(holder.target) in (list, deque) and keys == list(range(len(holder.target)))
    ):
        return iter, False
    if isinstance(holder, Bytes):
        return (lambda _: holder.get().get(0)), True
    if isinstance(holder, Slots):
        return operator.attrgetter(*keys), len(keys) == 1
    if isinstance(holder, Cell):
        return _CONTENTS, True
    if isinstance(holder, Environment):
        return (lambda variables: map(variables.get, keys)), False
    if isinstance(holder, ContextValue):
        return (lambda variable: value_of_variable(variable, GONE)), True
    if isinstance(holder.target, dict) and type(holder.target).__getitem__ is not dict.__getitem__:
        return (lambda owner: [dict.__getitem__(owner, key) for key in keys]), False  # a subclass may make its items
    return operator.itemgetter(*keys), len(keys) == 1


_CONTENTS = operator.attrgetter("cell_contents")


def plain_dict(holder: Holder) -> Any:
    """The dict behind a namespace; of all other holders their target."""
    space = holder.target
    if isinstance(holder, Names) and not isinstance(space, dict):
        return namespace_of(space) if isinstance(space, type) else vars(space)
    return space


class WatchedDict:
    """The conditions on one dict, to be looked at when it was changed.

    `values` are values that stand in it (None: nobody reads one), `keys` all its keys in their order (None: others may
    come). None of `absent` may come, and no key of `asked` that is not `known`.
    """

    def __init__(
        self,
        holder: Holder,
        values: MetValues | None,
        keys: list[Any] | None,
        known: Collection[Any],
        asked: Set[Any],
    ) -> None:
        self.target: dict[Any, Any] = plain_dict(holder)
        self._values, self._keys, self._known, self._asked = values, keys, known, asked

    def holds(self) -> bool:
        """Whether all are the very objects that they were. There are others that would do: this says False then."""
        held = self.target
        if self._keys is not None and list(held) != self._keys:
            return False
        if self._asked and not (held.keys() & self._asked).issubset(self._known):
            return False
        if self._values is None:
            return True
        try:
            now = self._values.getter(held)
        except LookupError:
            return False
        return all(map(operator.is_, (now,) if self._values.single else now, self._values.expected))


class UnusedNames:
    """A dict in which none of some names may come or go: the attributes of a tensor, or the methods of all tensors."""

    def __init__(self, target: dict[str, Any], names: Set[str]) -> None:
        self.target, self._names = target, names
        self._known = frozenset(target)

    def holds(self) -> bool:
        """Whether none has."""
        return self._names.isdisjoint(self.target.keys() ^ self._known)


class Forwards:
    """The forwards of some classes, and those of their methods that code names."""

    def __init__(self, classes: Iterable[Any], names: Set[str]) -> None:
        self._classes, self._names = list(classes), names
        self.bases: list[tuple[type, Any]] = [(cls, cls.__mro__) for cls in self._classes]
        """Each class, and the tuple of all its bases, which is another one where these are others."""
        spaces = {id(space): space for _, bases in self.bases for space in map(namespace_of, bases)}
        self.watched = [ForwardsIn(space, self) for space in spaces.values()]
        """All dicts in which one of them may come to stand."""
        self._before = self._now()

    def holds(self) -> bool:
        """Whether all are those that they were."""
        return self._now() == self._before

    def _now(self) -> list[Any]:
        forwards = [getattr(cls, "forward", None) for cls in self._classes]
        methods = [
            {name: held for name in one.target.keys() & self._names if isinstance(held := one.target[name], _METHODS)}
            for one in self.watched
        ]
        return [forwards, methods]


_METHODS = FunctionType, property, classmethod, staticmethod


@dataclass
class ForwardsIn:
    """One dict in which a forward may come to stand."""

    target: dict[str, Any]
    of: Forwards

    def holds(self) -> bool:
        """Whether all forwards are those that they were."""
        return self.of.holds()


def form(tensor: Tensor | np.ndarray) -> tuple[Any, ...]:
    """All of a tensor that a trace depends on, which is not its values; all of an array."""
    if isinstance(tensor, np.ndarray):
        return tensor.dtype, tensor.shape, tensor.tobytes()
    return tensor.requires_grad, tensor.dtype, tensor.shape, isinstance(tensor, nn.Parameter)


def brief(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
