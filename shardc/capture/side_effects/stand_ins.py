"""Stand-ins for what forward changes at every call: they tell whether forward also reads it.

    self.steps += 1                # Counter: steps + 1, whatever steps is
    self.losses.append(loss)       # a list that can only be written to: one element more, whatever it holds

A run of forward has found that it changes these. The trace runs with stand-ins in their places. If no code asks what a
stand-in holds, the program does not depend on it: no guard is needed. A comparison of a counter is a guard of its own.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from shardc.capture.side_effects.holders import (
    Attributes,
    Cell,
    Contents,
    ContextValue,
    Elements,
    Holder,
    Items,
    Location,
    Names,
    Registry,
)
from shardc.capture.side_effects.readings import Reading
from shardc.capture.side_effects.snapshot import Change


class Read(Exception):
    """Code has asked for what a stand-in holds."""


@dataclass(frozen=True)
class Condition:
    """What forward has found when it compared a number that stands in `place`."""

    place: Location
    holds: Callable[[Any], bool]

    def broken(self) -> str:
        """Why it does not hold now; "" if it does."""
        now = self.place.get()
        return "" if self.holds(now) else f"{self.place} is {now}, with which forward takes another branch"


@dataclass(frozen=True)
class StandInCandidate:
    """A holder that forward changes so that a stand-in could take its part: the numbers in it that change, or that it
    is a container in which values were put and nothing else was changed."""

    holder: Holder
    numbers: tuple[Any, ...] = ()
    grows: bool = False


class ChangesAtEveryCall(Exception):
    """Forward changes what stand-ins could take the part of: the trace is to begin again with them. `places` are those
    where a container stands."""

    def __init__(self, chosen: list[StandInCandidate], places: Callable[[Any], list[Location]]) -> None:
        super().__init__()
        self.candidates, self.places = chosen, places


def candidates(
    changes: Iterable[Change], holders: Iterable[Holder] = (), others: Collection[tuple[int, Any]] = ()
) -> list[StandInCandidate]:
    """What stand-ins could take the part of: of what forward changes, and of what `others` have changed in the
    `holders`, each given as the identity of the holder's target and a key."""
    found: dict[int, tuple[Holder, dict[Any, None]]] = {}
    chosen: list[StandInCandidate] = []
    for change in changes:
        holder = change.holder
        numbers = [key for key in change.written if _is_number(change.before, key) or _is_asked(change, key)]
        if _has_numbers(holder) and numbers:
            found.setdefault(id(holder.target), (holder, {}))[1].update(dict.fromkeys(numbers))
        elif type(holder.target) in _WRITE_ONLY and not isinstance(holder, Attributes) and _grew(change):
            chosen.append(StandInCandidate(holder, grows=True))
    changed = {target for target, _ in others}
    for holder in holders if changed else ():
        if id(holder.target) in changed and _has_numbers(holder):
            held = holder.get()
            keys = [key for target, key in others if target == id(holder.target) and _is_number(held, key)]
            found.setdefault(id(holder.target), (holder, {}))[1].update(dict.fromkeys(keys))
    return [StandInCandidate(holder, tuple(keys)) for holder, keys in found.values() if keys] + chosen


def _has_numbers(holder: Holder) -> bool:
    if isinstance(holder, Registry) or (isinstance(holder, Attributes) and isinstance(holder.owner, Tensor)):
        return False  # a tensor of the trace has attributes of its own
    return isinstance(holder, (Items, Elements, Names, Cell, ContextValue))


def _is_number(held: Contents, key: Any) -> bool:
    return type(held.get(key)) in (int, float)


def _is_asked(change: Change, key: Any) -> bool:
    return key in change.before and type(change.now[key]) is Reading


class StandIns:
    """The stand-ins of one trace. `places_of` are the places where a container stands.

    Places and containers in `read` have none, because code reads them. The set grows during the trace.
    """

    def __init__(
        self, chosen: Iterable[StandInCandidate], places_of: Callable[[Any], list[Location]], read: set[Any]
    ) -> None:
        self.conditions: list[Condition] = []
        self.numbers: list[Location] = []
        self.containers: dict[int, tuple[Holder, list[Location]]] = {}
        self._standing: list[tuple[Holder, Any]] = []
        self._read = read
        for one in chosen:
            target = one.holder.target
            self.numbers += [Location(one.holder, key) for key in one.numbers if (id(target), key) not in read]
            places = places_of(target)
            if one.grows and places and id(target) not in read:
                self.containers[id(target)] = one.holder, places

    def __bool__(self) -> bool:
        return bool(self.numbers or self.containers)

    def put(self) -> None:
        """Put the stand-ins where they stand in."""
        self.conditions.clear()
        self._standing.clear()
        for place in self.numbers:
            place.set(Counter(self, place, place.get(), lambda value: value))
        for holder, places in self.containers.values():
            stand_in = _WRITE_ONLY[type(holder.target)](holder.target, self)
            self._standing.append((holder, stand_in))
            for place in places:
                place.set(stand_in)

    def written(self) -> Iterable[tuple[Holder, Contents]]:
        """The containers, and what the model has put into them; the stand-ins are forgotten."""
        standing, self._standing = self._standing, []
        for holder, stand_in in standing:
            yield holder, stand_in.contents()

    def note(self, what: Any) -> NoReturn:
        """Code has read a stand-in: the next trace goes without it."""
        self._read.add(what)
        raise Read("the model reads what it changes")

    def check(self, arguments: Iterable[Any]) -> None:
        """Raise Read if an operator of torch is given a stand-in, whose contents it would not ask for."""
        for argument in arguments:
            if type(argument) in _KINDS:
                argument.reads()


def _grew(change: Change) -> bool:
    if isinstance(change.holder, Elements):
        before, now = list(change.before.values()), list(change.now.values())
        return len(now) >= len(before) and all(a is b for a, b in zip(before, now, strict=False))
    return not change.deleted


class Counter:
    """A number that is not known: what is computed from it is a formula over the one that stands in `place`.

    In this trace it stands for `value`; the formula of a number that stood there before is the identity.
    """

    def __init__(self, owner: StandIns, place: Location, value: Any, formula: Callable[[Any], Any]) -> None:
        self.owner, self.place, self.value, self.formula = owner, place, value, formula

    @property
    def __class__(self) -> type:  # type: ignore[override]  # for isinstance
        return type(self.value)

    def reads(self, *_: Any) -> NoReturn:
        """Note that code asks for the number itself."""
        self.owner.note((id(self.place.holder.target), self.place.key))

    def computed(self, function: Callable[[Any, Any], Any], other: Any, swapped: bool) -> Counter:
        """The result of an operation with another number."""
        if type(other) not in (bool, int, float):
            self.reads()
        formula = self.formula

        def whole(value: Any) -> Any:
            return function(other, formula(value)) if swapped else function(formula(value), other)

        value = function(other, self.value) if swapped else function(self.value, other)
        return Counter(self.owner, self.place, value, whole)

    def compared(self, function: Callable[[Any, Any], Any], other: Any) -> bool:
        """The outcome of a comparison, which becomes a guard."""
        if type(other) not in (bool, int, float):
            self.reads()
        formula, outcome = self.formula, bool(function(self.value, other))
        self.owner.conditions.append(Condition(self.place, lambda now: bool(function(formula(now), other)) == outcome))
        return outcome

    def __bool__(self) -> bool:
        return self.compared(operator.ne, 0)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self.reads()

    __hash__ = reads  # type: ignore[assignment]
    __int__ = __float__ = __index__ = __complex__ = __str__ = __repr__ = __format__ = reads
    __round__ = __trunc__ = __floor__ = __ceil__ = __divmod__ = __rdivmod__ = __reduce__ = reads


def _operation(function: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Counter, Any], Counter]:
    return lambda counter, other: counter.computed(function, other, swapped)


def _comparison(function: Callable[[Any, Any], Any]) -> Callable[[Counter, Any], bool]:
    return lambda counter, other: counter.compared(function, other)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Counter, f"__{_name}__", _operation(getattr(operator, _name), False))
    setattr(Counter, f"__r{_name}__", _operation(getattr(operator, _name), True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Counter, f"__{_name}__", _comparison(getattr(operator, _name)))


def _write_only(kind: type, writers: Iterable[str], contents: Callable[[Any], Contents]) -> type:
    """A subclass of a container whose methods refuse, but for its `writers`."""

    def init(self: Any, like: Any, owner: StandIns) -> None:
        kind.__init__(self)
        self._owner, self._like = owner, id(like)

    def reads(self: Any, *_: Any, **__: Any) -> NoReturn:
        owner: StandIns = self._owner
        owner.note(self._like)

    safe = {"__new__", "__init__", "__class__", "__getattribute__", "__setattr__", "__delattr__", "__init_subclass__",
            "__subclasshook__", "__dir__", "__doc__", "__class_getitem__"}  # fmt: skip
    refusing = {name: reads for name in dir(kind) if name not in safe and name not in writers}
    own = {"__init__": init, "reads": reads, "contents": contents, "__hash__": None}
    return type(f"WriteOnly{kind.__name__.title()}", (kind,), refusing | own)


_WRITE_ONLY: dict[type, Any] = {
    list: _write_only(list, ("append", "extend", "__iadd__"), lambda self: dict(enumerate(list.__iter__(self)))),
    deque: _write_only(deque, ("append", "extend", "__iadd__"), lambda self: dict(enumerate(deque.__iter__(self)))),
    dict: _write_only(dict, ("__setitem__", "update"), lambda self: dict(dict.items(self))),
    set: _write_only(set, ("add", "update"), lambda self: {item: item for item in set.__iter__(self)}),
}
_KINDS = frozenset({Counter, *_WRITE_ONLY.values()})
