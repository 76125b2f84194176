"""Containers among the arguments of a call: each call brings its own, so they are found by the way to them.

def forward(self, batch):
    batch["logits"] = ...        # Argument(way=(0, 0)): args[0], whichever dict it is in this call
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardc.capture.side_effects.holders import Attributes, Contents, Holder, holder_of
from shardc.capture.side_effects.reachable import PLAIN
from shardc.capture.torch_patches.symbols import is_symbolic

Way = tuple[Any, ...]
"""How to get from the pair (args, kwargs) to a value: keys, indices, and names of attributes in `Attribute`."""


class Attribute(str):
    """A step of a way that is an attribute's name."""


class Argument(Holder):
    """A container in the arguments, of this call or of any other."""

    def __init__(self, inner: Holder, way: Way) -> None:
        super().__init__(inner.target, inner.path)
        self._inner: Holder | None = inner
        self.of_object = isinstance(inner, Attributes)
        self.way = way

    def get(self) -> Contents:
        return self._inner.get() if self._inner else {}

    def put(self, contents: Mapping[Any, Any]) -> None:
        if self._inner:
            self._inner.put(contents)

    def forget(self) -> None:
        """Let go of the container of this call, which holds tensors of the trace."""
        self._inner = self.target = None

    def of(self, arguments: Any) -> Holder:
        """The holder in the arguments of another call."""
        value = reached(arguments, self.way)
        holder = Attributes(value, self.path) if self.of_object else holder_of(value, self.path)
        assert holder is not None  # the structure of the arguments is part of what a program was compiled for
        return holder


def passed_objects(arguments: Any) -> dict[int, Way]:
    """The ways to the objects in the arguments that are no plain containers, by identity."""
    holders = [one for one in argument_holders(arguments) if one.of_object]
    return {id(reached(arguments, one.way)): one.way for one in holders}


def passed_containers(arguments: Any) -> dict[int, Way]:
    """The ways to all containers and objects in the arguments, by identity."""
    return {id(reached(arguments, one.way)): one.way for one in argument_holders(arguments)}


def reached(arguments: Any, way: Way) -> Any:
    """The value at the end of a way."""
    value = arguments
    for step in way:
        value = getattr(value, step) if isinstance(step, Attribute) else value[step]
    return value


_FLAT = frozenset({type(None), bool, int, float, str})


class Containers:
    """The lists, dicts, sets and objects in the arguments of a call (args and kwargs), which code may tell apart by
    `is`."""

    def __init__(self, arguments: Any) -> None:
        self.found: list[Any] = []
        """Each once, in the order in which they are met."""
        self.again: list[int] = []
        """The numbers of those that are met again."""
        self.tensors: list[Tensor] = []
        """The tensors that are met, in this order."""
        known: dict[int, int] = {}
        args, kwargs = arguments
        todo: list[Any] = [*args, *kwargs.values()]
        while todo:
            value = todo.pop()
            if isinstance(value, Tensor):
                self.tensors.append(value)
                continue
            if type(value) in _FLAT:
                continue
            if isinstance(value, tuple):
                todo += value
                continue
            inside = _inside(value)
            if inside is None:
                continue
            if id(value) in known:
                self.again.append(known[id(value)])
                continue
            known[id(value)] = len(known)
            self.found.append(value)
            todo += inside

    def own(self, holds: Callable[[Any], bool]) -> tuple[int, ...]:
        """The numbers of those that are the model's own."""
        return tuple(number for number, value in enumerate(self.found) if holds(value))

    def shares(self, known: Callable[[Any], bool], others: Iterable[Any]) -> bool:
        """Whether one is met twice, is `known`, or is in other values as well."""
        if self.again or any(map(known, self.found)):
            return True
        elsewhere = set(map(id, Containers((others, {})).found)) if self.found else set[int]()
        return any(id(value) in elsewhere for value in self.found)

    def copied(self, arguments: Any, leaves: Sequence[Any], traced: Iterable[Any], own: Iterable[int]) -> Any:
        """The arguments with `traced` in the places of the `leaves`, in new containers, which are one where those of
        the call are; those that are the model's `own` are no new ones."""
        memo = {id(leaf): new for leaf, new in zip(leaves, traced, strict=True)}
        return copy.deepcopy(arguments, memo | {id(self.found[number]): self.found[number] for number in own})


def _inside(value: Any) -> Iterable[Any] | None:
    """What is in a container, or in an object that pytree opens; None for all others, which are leaves of a call."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, deque, set)):
        return value
    if type(value) not in pytree.SUPPORTED_NODES or not hasattr(value, "__dict__"):
        return None
    return vars(value).values()


def argument_holders(arguments: Any, own: Callable[[Any], bool] = lambda _: False) -> Iterator[Argument]:
    """The containers and objects in the arguments that code could change, but for the model's `own`."""
    seen = set[int]()
    todo: deque[tuple[Any, Way, str]] = deque([(arguments, (), "the arguments")])
    while todo:
        value, way, path = todo.popleft()
        if (
            isinstance(value, (*PLAIN, Tensor, nn.Module, type))
            or is_symbolic(value)
            or id(value) in seen
            or own(value)
        ):
            continue
        seen.add(id(value))
        holder = holder_of(value, path)
        if holder is None and not callable(value) and hasattr(value, "__dict__"):
            holder = Attributes(value, path)
            todo += [(item, (*way, Attribute(key)), holder.name(key)) for key, item in holder.get().items()]
        elif isinstance(value, (tuple, list, deque)):
            todo += [(item, (*way, index), f"{path}[{index}]") for index, item in enumerate(value)]
        elif isinstance(value, dict):
            todo += [(item, (*way, key), f"{path}[{key!r}]") for key, item in value.items()]
        if holder is not None:
            yield Argument(holder, way)
