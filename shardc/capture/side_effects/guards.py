"""Guards: the plain values that a trace may have read, compared at every call.

    guards = Guards(snapshot, reachable.names)      # model.config.tau is 1.0
    model.config.tau = 0.5
    guards.broken()                                 # "model.config.tau is 0.5, and was 1.0"

Plain values are compared by type and value, NumPy arrays by their bytes, functions and other objects by identity. The
values of tensors go into every run, so only their shapes, dtypes and the like are compared. Nearly always every value
is the object that it was, and one pass over all of them in C says so.
"""

from __future__ import annotations

import math
import operator
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shardc.capture.side_effects.holders import (
    Attributes,
    Bytes,
    Cell,
    Contents,
    ContextValue,
    Environment,
    Holder,
    Library,
    Location,
    Members,
    Names,
    Slots,
)
from shardc.capture.side_effects.reachable import PLAIN
from shardc.capture.side_effects.replay import SideEffect
from shardc.capture.side_effects.stand_ins import StandIns
from shardc.runtime.mesh.parameters import RECORD

NEVER_READ = frozenset({"_shardc", RECORD})
"""Attributes of shardc's own."""


class Guards:
    """The conditions under which a program is that of a call: that `contents` is what the holders hold.

    Of objects, the attributes in `names` count. `effects` are what the program does at every run: what it writes is
    another object then, and no other object may take the place of the holder. `stand_ins` tell what forward changes
    but does not read. `live` are further holders that the program reads at every run.
    """

    def __init__(
        self,
        contents: Iterable[tuple[Holder, Contents]],
        names: Collection[str],
        effects: Sequence[SideEffect] = (),
        live: Collection[int] = (),
        stand_ins: StandIns | None = None,
    ) -> None:
        self._conditions = [] if stand_ins is None else list(stand_ins.conditions)
        unread = set[tuple[int, Any]]() if stand_ins is None else {_key(place) for place in stand_ins.numbers}
        untouched = set[int]() if stand_ins is None else stand_ins.containers.keys()
        written = {(id(effect.holder.target), key) for effect in effects for key in effect.written}
        self._live, self._names = live, frozenset(names)
        self._known: dict[int, list[Any]] = {}
        """Tensors and arrays, and the form that the trace has seen of them, by identity. (A parameter that becomes a
        DTensor is replaced in lists; in a tuple it could not be.)"""
        self._values: list[_Values] = []
        self._written: list[tuple[Location, Any]] = []
        self._sized: list[tuple[Holder, int]] = []
        self._empty: list[Any] = []
        self._counted: dict[int, tuple[Holder, list[Any]]] = {}
        """Containers of which nothing but these keys is there, by the identity of their holders."""
        self._unread: list[tuple[Location, Any]] = []
        """What the trace has met and not read, which any other value may stand for."""
        contents = list(contents)
        self._held = {id(holder.owner if isinstance(holder, Attributes) else holder.target) for holder, _ in contents}
        for holder, held in contents:
            self._unread += [(Location(holder, key), held[key]) for key in held if (id(holder.target), key) in unread]
            if id(holder.target) in untouched and not isinstance(holder, (Attributes, Names, Environment)):
                self._counted[id(holder)] = holder, list(held)
                self._unread += [(Location(holder, key), value) for key, value in held.items()]
                continue
            of_object = isinstance(holder, Slots) or (isinstance(holder, Attributes) and not holder.whole)
            keys = [
                key for key in held if key not in NEVER_READ and (key in names or key == "forward" or not of_object)
            ]
            keys = [key for key in keys if (id(holder.target), key) not in unread]
            counted = isinstance(holder, Attributes) and holder.whole
            if counted or (
                type(holder.target) in _COUNTED and not isinstance(holder, (Attributes, Names, Environment, Library))
            ):
                self._counted[id(holder)] = holder, list(held)
                if held:
                    self._sized.append((holder, len(held)))
                else:
                    self._empty.append(holder.target)
            if keys and len(held) <= MOST_COMPARED:
                quick = [key for key in keys if (id(holder.target), key) not in written]
                self._written += [(Location(holder, key), held[key]) for key in keys if key not in quick]
                if quick:
                    self._values.append(_Values(holder, quick, [held[key] for key in quick]))
            absent = [key for target, key in written if target == id(holder.target) and key not in held]
            self._written += [(Location(holder, key), GONE) for key in absent if not of_object or key in names]
        owners = [holder.owner for holder, _ in contents if isinstance(holder, Attributes)]
        modules = [owner for owner in owners if isinstance(owner, nn.Module)]
        self._modules = modules
        self._types = list(map(type, modules))
        self._classes = list(dict.fromkeys(self._types))
        self._forwards = [cls.forward for cls in self._classes]
        self._unpatched = [vars(module) for module in modules if "forward" not in vars(module)]
        self._open = [(holder, held.keys()) for holder, held in contents if _may_grow(holder)]
        """What may get attributes that it did not have, and that code asks for."""
        self._spaces = [holder.target for holder, _ in self._open]
        self._sizes = list(map(len, self._spaces))
        self._queries = [(query, query()) for name, query in _QUERIES.items() if name in self._names]
        self._methods = frozenset(vars(Tensor))
        self._gather()

    def _gather(self) -> None:
        """Lay all values out in a row, for the quick comparison."""
        single = [values for values in self._values if values.single]
        several = [values for values in self._values if not values.single]
        self._single = [values.getter for values in single], [values.target for values in single]
        self._several = [values.getter for values in several], [values.target for values in several]
        self._expected = [item for values in (*single, *several) for item in values.expected]
        ordered = [holder for holder, length in self._sized if length > 1 and isinstance(holder.target, dict)]
        self._dicts = [holder.target for holder in ordered]
        self._orders = [self._counted[id(holder)][1] for holder in ordered]
        self._lengths = [length for _, length in self._sized]
        self._containers = [holder.target for holder, _ in self._sized]
        items = {id(item): item for item in self._expected}.values()
        self._tensors = [item for item in items if isinstance(item, Tensor)]
        self._arrays = [item for item in items if isinstance(item, np.ndarray)]
        for item in (*self._tensors, *self._arrays):
            self._known.setdefault(id(item), [item, _form(item)])
        self._forms = [self._known[id(tensor)][1] for tensor in self._tensors]
        self._bare = [held for held in map(vars, self._tensors) if self._names.isdisjoint(held)]

    def broken(self) -> str:
        """What does not hold any more, in a few words; "" if all holds."""
        if list(map(type, self._modules)) != self._types:
            return "a module is of another class than it was"
        if [cls.forward for cls in self._classes] != self._forwards or any(
            "forward" in attributes for attributes in self._unpatched
        ):
            return "a module has another forward than it had"
        if any(self._empty):
            return f"{next(filter(None, self._empty))!r} was empty"
        for held in filter(None, self._bare) if any(self._bare) else ():
            if not self._names.isdisjoint(held):
                return f"a tensor has attributes that it had not: {', '.join(held)}"
        if list(map(len, self._containers)) != self._lengths:
            return next(
                f"{holder.path} has {len(holder.target)} elements, and had {length}"
                for holder, length in self._sized
                if len(holder.target) != length
            )
        if [*map(list, self._dicts)] != self._orders:
            return next(
                f"{holder.path} has its keys in another order than it had"
                for holder, keys in self._counted.values()
                if isinstance(holder.target, dict) and list(holder.target) != keys
            )
        if list(map(len, self._spaces)) != self._sizes:
            reason = self._appeared()
            if reason:
                return reason
        queried = [query() for query, _ in self._queries]
        for (query, before), now in zip(self._queries, queried, strict=True):
            if now != before:
                return f"torch.{query.__name__}() is {now}, and was {before}"
        if len(vars(Tensor)) != len(self._methods) and not self._names.isdisjoint(vars(Tensor).keys() ^ self._methods):
            return "a method of torch.Tensor is another than it was"
        try:
            several = chain.from_iterable(map(_call, *self._several))
            same = all(map(operator.is_, chain(map(_call, *self._single), several), self._expected))
        except (LookupError, AttributeError, ValueError):
            same = False
        reason = "" if same else self._compare()
        for place, before in () if reason else self._written:
            now = place.holder.get().get(place.key, GONE)
            if not self._equal(now, before):
                reason = f"{place} is {_brief(now)}, and was {_brief(before)}"
        reason = reason or next(filter(None, (condition.broken() for condition in self._conditions)), "")
        if reason:
            return reason
        with torch._C.DisableTorchFunctionSubclass():  # DTensors answer slowly otherwise
            forms = list(map(_form, self._tensors))
        for tensor, now, form in zip(self._tensors, forms, self._forms, strict=True) if forms != self._forms else ():
            if now != form:
                return f"a tensor is {_form(tensor)}, and was {form}"
        for array in self._arrays:
            if _form(array) != self._known[id(array)][1]:
                return f"an array of shape {array.shape} has other values than it had"
        return ""

    def _appeared(self) -> str:
        """What code asks for and was not there; "" if nothing is there now."""
        for index, (holder, known) in enumerate(self._open):
            if len(holder.target) != self._sizes[index]:
                asked = holder.used.keys() if isinstance(holder, Names) else self._names
                written = {place.key for place, _ in self._written if place.holder.target is holder.target}
                new = (holder.target.keys() & asked) - known - NEVER_READ - written
                if new:
                    return f"{holder.name(min(new))} was not there"
        self._sizes = list(map(len, self._spaces))
        return ""

    def holds(self, value: Any) -> bool:
        """Whether a container or an object is one in which the code may read something."""
        return id(value) in self._held

    @contextmanager
    def as_captured(self) -> Generator[None]:
        """In here, what the trace has met stands where it stood, so that another trace is one of the same call."""
        with ExitStack() as stack:
            for holder, seen in self._seen():
                before = holder.get()
                counted = id(holder) in self._counted and len(self._counted[id(holder)][1]) <= MOST_COMPARED
                contents = {} if counted else {key: value for key, value in before.items() if key not in seen}
                for key, value in seen.items():
                    if value is not GONE:
                        contents[key] = before[key] if self._equal(before.get(key, GONE), value) else value
                same = contents.keys() == before.keys() and all(before[key] is contents[key] for key in before)
                if not same:
                    stack.callback(holder.put, before)
                    holder.put(contents)
            yield

    def _seen(self) -> Iterable[tuple[Holder, Contents]]:
        """The holders, and what the trace has met in them; GONE under a key that was not there."""
        found: dict[int, tuple[Holder, Contents]] = {}

        def places() -> Iterator[tuple[Holder, Any, Any]]:
            for values in self._values:
                yield from zip(repeat(values.holder), values.keys, values.expected, strict=False)
            for place, value in (*self._written, *self._unread):
                yield place.holder, place.key, value

        for holder, key, value in places():
            found.setdefault(id(holder), (holder, {}))[1][key] = value
        for identity, (holder, keys) in self._counted.items():
            seen = found.get(identity, (holder, {}))[1]
            found[identity] = holder, {key: seen[key] for key in keys if key in seen}
        return found.values()

    def _compare(self) -> str:
        """Compare value by value. What equals what was there takes its place, so that the next check is quick."""
        old_to_new, new_to_old = dict[int, int](), dict[int, int]()
        for values in self._values:
            contents = values.holder.get()
            for key, expected in zip(values.keys, values.expected, strict=False):
                now = contents.get(key, GONE)
                if now is not expected and not self._equal(now, expected):
                    name = values.holder.name(key)
                    return f"{name} is gone" if now is GONE else f"{name} is {_brief(now)}, and was {_brief(expected)}"
                if isinstance(now, Tensor) and (
                    old_to_new.setdefault(id(expected), id(now)) != id(now)
                    or new_to_old.setdefault(id(now), id(expected)) != id(expected)
                ):
                    return f"{values.holder.name(key)} is tied to other places than it was"
                if now is not expected and id(expected) in self._known:
                    self._known[id(now)] = [now, self._known.pop(id(expected))[1]]
            values.take(contents)
        self._gather()
        return ""

    def _equal(self, now: Any, expected: Any, deep: int = 8) -> bool:
        """Whether a value may stand for another one that the trace has seen."""
        if now is expected:
            return True
        if type(now) is not type(expected) or not deep:
            return False
        if isinstance(now, (Tensor, np.ndarray)):
            return bool(_form(now) == self._known.get(id(expected), [None, _form(expected)])[1])
        if isinstance(now, float) and now == expected == 0:
            return math.copysign(1, now) == math.copysign(1, expected)
        if isinstance(now, (*PLAIN, Enum)):
            return bool(now == expected) or (now != now and expected != expected)  # type: ignore[comparison-overlap]
        if id(expected) in self._live or callable(now):
            return False
        if isinstance(now, dict):
            items: Sequence[tuple[Any, Any]] = list(zip(now.values(), expected.values(), strict=False))
            return list(now) == list(expected) and all(self._equal(a, b, deep - 1) for a, b in items)
        if isinstance(now, (list, tuple)):
            pairs: Iterable[tuple[Any, Any]] = zip(now, expected, strict=False)
            return len(now) == len(expected) and all(self._equal(a, b, deep - 1) for a, b in pairs)
        if isinstance(now, (set, frozenset)):
            return bool(now == expected)
        return hasattr(now, "__dict__") and self._equal(vars(now), vars(expected), deep - 1)


_QUERIES: dict[str, Callable[[], Any]] = {
    name: getattr(torch, name)
    for name in ("get_num_threads", "get_num_interop_threads", "is_inference_mode_enabled", "initial_seed")
}
"""Functions of torch that tell something of the process or of the thread."""

_COUNTED = (dict, OrderedDict, defaultdict, list, deque, set)


_call: Any = operator.call  # whose type says too little for `map`


class _Gone:
    def __repr__(self) -> str:
        return "gone"


MOST_COMPARED = 100_000
"""Elements of a container that are compared one by one; of more, their number is."""

GONE = _Gone()
"""What stands in a place where nothing does."""


def _may_grow(holder: Holder) -> bool:
    if isinstance(holder, Names):
        return isinstance(holder.target, dict)
    return isinstance(holder, Attributes) and not holder.whole


def _key(place: Location) -> tuple[int, Any]:
    return id(place.holder.target), place.key


_call: Any = operator.call  # as a function in C; its type is that of a call of one argument


class _Values:
    """The values that stood under some keys of one holder, and how to get those that stand there now."""

    def __init__(self, holder: Holder, keys: list[Any], values: list[Any]) -> None:
        self.holder, self.keys = holder, keys
        self.getter, self.single = _getter(holder, keys)
        self.target = holder.target
        if isinstance(holder, Names) and not isinstance(holder.target, dict):
            self.target = vars(holder.target)  # a view of what a class or a module holds now
        self.expected = values

    def take(self, contents: Contents) -> None:
        """Expect these values from now on."""
        values = [contents[key] for key in self.keys]
        self.expected = values


def _getter(holder: Holder, keys: list[Any]) -> tuple[Callable[[Any], Any], bool]:
    """A function from the holder's target to its values under `keys`, and whether it gives the bare value, of one."""
    if isinstance(holder, Members):
        return iter, False
    if isinstance(holder, Bytes):
        return (lambda _: holder.get().get(0)), True
    if isinstance(holder, Slots):
        return operator.attrgetter(*keys), len(keys) == 1
    if isinstance(holder, Cell):
        return operator.attrgetter("cell_contents"), True
    if isinstance(holder, Environment):
        return (lambda variables: map(variables.get, keys)), False
    if isinstance(holder, ContextValue):
        return (lambda variable: variable.get(GONE)), True
    if isinstance(holder.target, dict) and type(holder.target).__getitem__ is not dict.__getitem__:
        return (lambda owner: [dict.__getitem__(owner, key) for key in keys]), False  # a subclass may make its items
    return operator.itemgetter(*keys), len(keys) == 1


def _form(tensor: Tensor | np.ndarray) -> tuple[Any, ...]:
    """All of a tensor that a trace depends on, which is not its values; all of an array."""
    if isinstance(tensor, np.ndarray):
        return tensor.dtype, tensor.shape, tensor.tobytes()
    return tensor.requires_grad, tensor.dtype, tensor.shape, isinstance(tensor, nn.Parameter)


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
