"""Side effects as data: what a call of the model leaves behind, made again at every run of its program.

    self.seen.append((h, "relu"))
    ->  SideEffect(model.seen, appended=(Fresh(tuple, (ProgramResult(1), Kept("relu"))),))

A value is described by what it is made of: results of the program, inputs of the call, what stood there before, and
objects that exist. What the model makes anew at every call is made anew at every run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardc.capture.experts.counts import Count
from shardc.capture.side_effects.arguments import Argument, Way, reached
from shardc.capture.side_effects.holders import Contents, Holder, Location
from shardc.capture.side_effects.reachable import PLAIN
from shardc.capture.side_effects.readings import Asked, Reading
from shardc.capture.side_effects.snapshot import Change
from shardc.capture.side_effects.stand_ins import Counter
from shardc.capture.torch_patches.fake_tensors import is_traced
from shardc.errors import CaptureError


@dataclass
class CallRun:
    """What values are made of in one run: the program's results, the flat inputs, the arguments as they were given, and
    what the holder held before."""

    results: Sequence[Any]
    inputs: Sequence[Any]
    arguments: Any
    before: Contents = field(default_factory=dict[Any, Any])
    numbers: Mapping[Location, Any] = field(default_factory=dict[Location, Any])
    """What stood in the places of counters before the call."""
    number: Callable[[Any], Any] = lambda value: value
    """Puts the sizes of this run into symbolic numbers."""
    made: dict[int, Any] = field(default_factory=dict[int, Any])
    """What was made already, by the identity of its description: two places may hold one object."""


class Recipe(ABC):
    """The description of a value."""

    @abstractmethod
    def make(self, run: CallRun) -> Any:
        """The value in this run."""


@dataclass(frozen=True)
class Kept(Recipe):
    """An object that exists, or a value that never changes but with the sizes of inputs."""

    value: Any

    def make(self, run: CallRun) -> Any:
        return run.number(self.value)


@dataclass(frozen=True)
class Copied(Recipe):
    """A tensor that is the same at every call, and made anew."""

    value: Tensor

    def make(self, run: CallRun) -> Any:
        return self.value.clone()


@dataclass(frozen=True)
class ProgramResult(Recipe):
    """A result of the program, by its position."""

    index: int

    def make(self, run: CallRun) -> Any:
        return run.results[self.index]


@dataclass(frozen=True)
class Given(Recipe):
    """An input of the call, by its position among the flat inputs."""

    index: int

    def make(self, run: CallRun) -> Any:
        return run.inputs[self.index]


@dataclass(frozen=True)
class Passed(Recipe):
    """An object among the arguments of the call."""

    way: Way

    def make(self, run: CallRun) -> Any:
        return reached(run.arguments, self.way)


@dataclass(frozen=True)
class Standing(Recipe):
    """The tensor that stands in a place: a parameter, say."""

    place: Location

    def make(self, run: CallRun) -> Any:
        return self.place.get()


@dataclass(frozen=True)
class Before(Recipe):
    """What stood under a key of the holder before the call."""

    key: Any

    def make(self, run: CallRun) -> Any:
        return run.before[self.key]


@dataclass(frozen=True)
class Computed(Recipe):
    """A number that follows from the one that stood in a place before the call."""

    place: Location
    formula: Callable[[Any], Any]

    def make(self, run: CallRun) -> Any:
        return self.formula(run.numbers[self.place])


@dataclass(frozen=True)
class Told(Recipe):
    """What the world says in this run: see `readings`."""

    asked: Asked
    formula: Callable[[Any], Any]

    def make(self, run: CallRun) -> Any:
        if id(self.asked) not in run.made:
            run.made[id(self.asked)] = self.asked.function()
        return self.formula(run.made[id(self.asked)])


@dataclass(frozen=True, eq=False)
class Fresh(Recipe):
    """A container or an object that the model makes anew: its class, and its contents by key."""

    kind: type
    empty: Any = None
    """An empty container of the kind, to copy; None for tuples and objects."""
    contents: dict[Any, Recipe] = field(default_factory=dict[Any, Recipe])

    def make(self, run: CallRun) -> Any:
        if id(self) not in run.made:
            self._make(run)
        return run.made[id(self)]

    def _make(self, run: CallRun) -> None:
        if issubclass(self.kind, tuple):
            values = [value.make(run) for value in self.contents.values()]
            run.made[id(self)] = self.kind(*values) if hasattr(self.kind, "_fields") else self.kind(values)
            return
        whole: Any = object.__new__(self.kind) if self.empty is None else self.empty.copy()
        run.made[id(self)] = whole  # before its contents, which may hold it
        contents = {key: value.make(run) for key, value in self.contents.items()}
        if isinstance(whole, dict):
            whole.update(contents)
        elif isinstance(whole, set):
            whole.update(contents.values())
        elif self.empty is not None:
            whole.extend(contents.values())
        else:
            vars(whole).update(contents)


@dataclass(frozen=True, eq=False)
class Opened(Recipe):
    """An object of a class that torch's pytree opens, made anew of its parts."""

    unflatten: Callable[[list[Any]], Any]
    parts: list[Recipe]

    def make(self, run: CallRun) -> Any:
        if id(self) not in run.made:
            run.made[id(self)] = self.unflatten([part.make(run) for part in self.parts])
        return run.made[id(self)]


class Describer:
    """Makes descriptions of the values that one trace left behind.

    `tensor` describes a tensor of the trace. `exists` tells whether an object was there before the call. `known` are
    descriptions that there are already, by the identity of the value.
    """

    def __init__(
        self, tensor: Callable[[Tensor], Recipe], exists: Callable[[Any], bool], known: Mapping[int, Recipe]
    ) -> None:
        self._tensor, self._exists = tensor, exists
        self._known = dict(known)
        self._alive: list[Any] = []
        self.early: list[Asked] = []
        """What is asked before the run."""

    def describe(self, value: Any) -> Recipe:
        """The description of a value; one object has one description."""
        if type(value) is Counter:
            return Computed(value.place, value.formula)
        if type(value) is Reading:
            if value.asked.early and value.asked not in self.early:
                self.early.append(value.asked)
            return Told(value.asked, value.formula)
        if isinstance(value, Count):
            value.leaves()
        if isinstance(value, Tensor):
            return self._tensor(value)
        if id(value) not in self._known:
            self._alive.append(value)
            self._describe(value)
        return self._known[id(value)]

    def _describe(self, value: Any) -> None:
        if not self._exists(value):
            node = pytree.SUPPORTED_NODES.get(type(value))
            if isinstance(value, dict) and type(value) is not dict and node is not None:  # transformers' outputs, say
                children, context = node.flatten_fn(value)
                parts = [self.describe(child) for child in children]
                self._known[id(value)] = Opened(lambda made: node.unflatten_fn(made, context), parts)
                return None
            if isinstance(value, (list, tuple, deque)):
                return self._fresh(value, dict(enumerate(value)))
            if isinstance(value, dict):
                return self._fresh(value, value)
            if isinstance(value, set):
                return self._fresh(value, {item: item for item in value})
            if holds_tensors(value):
                return self._fresh(value, vars(value))
        self._known[id(value)] = Kept(value)
        return None

    def _fresh(self, value: Any, contents: Mapping[Any, Any]) -> None:
        fresh = Fresh(type(value), _emptied(value))
        self._known[id(value)] = fresh
        for key, item in contents.items():
            fresh.contents[key] = self.describe(item)


def _emptied(value: Any) -> Any:
    """An empty container of the same kind, so that no description holds a tensor of the trace."""
    if not isinstance(value, (dict, list, set, deque)):
        return None
    empty = value.copy()
    empty.clear()
    return empty


def holds_tensors(value: Any, deep: int = 6) -> bool:
    """Whether an object that is no module has tensors in its attributes, or what is as little the same at every call,
    however deep in containers."""
    if isinstance(value, Tensor) or type(value) in (Counter, Reading) or isinstance(value, Count):
        return True
    if not deep or isinstance(value, (type, nn.Module)):
        return False
    inside: Any = ()
    if isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        inside = value
    elif hasattr(value, "__dict__") and not callable(value):
        inside = vars(value).values()
    return any(holds_tensors(item, deep - 1) for item in list(inside)[:1000])


@dataclass(frozen=True)
class SideEffect:
    """What a call does to one holder."""

    holder: Holder
    written: Mapping[Any, Recipe]
    deleted: Sequence[Any] = ()
    appended: Sequence[Recipe] | None = None
    order: Sequence[Any] = ()
    """All keys, where the call changes their order."""

    def replay(self, run: CallRun) -> None:
        """Do it again."""
        holder = self.holder.of(run.arguments) if isinstance(self.holder, Argument) else self.holder
        if self.appended is not None:
            holder.target.extend([value.make(run) for value in self.appended])
            return
        run.before = holder.get()
        contents = {key: value for key, value in run.before.items() if key not in self.deleted}
        contents |= {key: value.make(run) for key, value in self.written.items()}
        holder.put({key: contents[key] for key in self.order} if self.order else contents)


def side_effect(change: Change, describer: Describer) -> SideEffect:
    """The side effect behind a change."""
    for key in change.written:
        if is_traced(key):
            raise CaptureError(
                f"forward keeps something in {change.holder.path} under a tensor as the key: tensors are others at "
                "every call. Use a number or a string as the key"
            )
    stood = {id(value): key for key, value in change.before.items() if not isinstance(value, (*PLAIN, Enum))}
    if isinstance(change.holder.target, (list, deque)):
        before, now = list(change.before.values()), list(change.now.values())
        limit = getattr(change.holder.target, "maxlen", None)
        kept = len(before) if limit is None else max(0, min(len(before), limit - 1))
        for start in range(len(before) - kept, len(before) + 1) if limit else (0,):
            old = before[start:]
            if old and len(now) >= len(old) and all(a is b for a, b in zip(old, now, strict=False)):
                return SideEffect(change.holder, {}, (), [describer.describe(value) for value in now[len(old) :]])
        if not before:
            return SideEffect(change.holder, {}, (), [describer.describe(value) for value in now])

    def described(key: Any, value: Any) -> Recipe:
        return Before(stood[id(value)]) if id(value) in stood and key != stood[id(value)] else describer.describe(value)

    natural = [
        *(key for key in change.before if key in change.now),
        *(key for key in change.now if key not in change.before),
    ]
    order = () if natural == list(change.now) else tuple(change.now)
    written = {key: described(key, change.now[key]) for key in change.written}
    return SideEffect(change.holder, written, change.deleted, order=order)
