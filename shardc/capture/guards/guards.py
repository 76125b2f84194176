"""Guards: the plain values that a trace may have read, compared at every call.

    guards = Guards(snapshot, reachable.names)      # model.config.tau is 1.0
    model.config.tau = 0.5
    guards.broken()                                 # "model.config.tau is 0.5, and was 1.0"

Plain values are compared by type and value, NumPy arrays by their bytes, functions and other objects by identity. The
values of tensors go into every run, so only their shapes, dtypes and the like are compared. Nearly always every dict is
as it was, which the versions of dicts say, and every other value is the object that it was.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from enum import Enum
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shardc.capture.guards.guarded_values import (
    GONE,
    NEVER_READ,
    Forwards,
    MetValues,
    UnusedNames,
    WatchedDict,
    brief,
    form,
    plain_dict,
)
from shardc.capture.guards.same_objects import DictCondition, SameObjects
from shardc.capture.side_effects.holders import (
    Attributes,
    Contents,
    Environment,
    Holder,
    Items,
    Library,
    Location,
    Names,
    Registry,
    Slots,
)
from shardc.capture.side_effects.reachable import PLAIN
from shardc.capture.side_effects.replay import SideEffect
from shardc.capture.side_effects.stand_ins import StandIns
from shardc.capture.side_effects.state_values import FoundValue, as_captured
from shardc.capture.torch_patches.module_internals import namespace_of
from shardc.capture.torch_patches.object_numbers import BASES, CLASS, COUNTED
from shardc.runtime.execute.tensor_kinds import TensorKinds


class Guards:
    """The conditions under which a program is that of a call: that `contents` is what the holders hold.

    Of objects, the attributes in `names` count. `effects` are what the program does at every run: what it writes is
    another object then, and no other object may take the place of the holder. `stand_ins` tell what forward changes
    but does not read, `values` what it has found in the model's tensors. `live` are further holders that the program
    reads at every run.
    """

    def __init__(
        self,
        contents: Iterable[tuple[Holder, Contents]],
        names: Collection[str],
        effects: Sequence[SideEffect] = (),
        live: Collection[int] = (),
        stand_ins: StandIns | None = None,
        values: Sequence[FoundValue] = (),
    ) -> None:
        self._values_asked = values
        self._conditions = [*([] if stand_ins is None else stand_ins.conditions), *values]
        unread = set[tuple[int, Any]]() if stand_ins is None else {_key(place) for place in stand_ins.numbers}
        untouched = set[int]() if stand_ins is None else stand_ins.containers.keys()
        written = {(id(effect.holder.target), key) for effect in effects for key in effect.written}
        self._live, self._names = live, frozenset(names)
        self._known: dict[int, list[Any]] = {}
        """Tensors and arrays, and the form that the trace has seen of them, by identity. (A parameter that becomes a
        DTensor is replaced in lists; in a tuple it could not be.)"""
        self._values: list[MetValues] = []
        self._written: list[tuple[Location, Any]] = []
        self._empty: list[Any] = []
        self._counted: dict[int, tuple[Holder, list[Any]]] = {}
        """Containers of which nothing but these keys is there, by the identity of their holders."""
        self._appending = set[int]()
        """Those of them in which forward puts more and reads nothing."""
        self._unread: list[tuple[Location, Any]] = []
        """What the trace has met and not read, which any other value may stand for."""
        contents = list(contents)
        self._held = {id(holder.owner if isinstance(holder, Attributes) else holder.target) for holder, _ in contents}
        for holder, held in contents:
            if isinstance(holder, Registry) and not _is_read(holder.kind, held, self._names):
                continue
            if holder.path.endswith(".__all__"):  # which nothing but `import *` reads
                continue
            self._unread += [(Location(holder, key), held[key]) for key in held if (id(holder.target), key) in unread]
            if id(holder.target) in untouched and not isinstance(holder, (Attributes, Names, Environment)):
                self._counted[id(holder)] = holder, list(held)
                self._appending.add(id(holder))
                self._unread += [(Location(holder, key), value) for key, value in held.items()]
                continue
            of_object = isinstance(holder, Slots) or (isinstance(holder, Attributes) and not holder.whole)
            keys = [
                key for key in held if key not in NEVER_READ and (key in names or key == "forward" or not of_object)
            ]
            keys = [key for key in keys if (id(holder.target), key) not in unread]
            counted = isinstance(holder, Attributes) and holder.whole
            if counted or (
                type(holder.target) in COUNTED and not isinstance(holder, (Attributes, Names, Environment, Library))
            ):
                self._counted[id(holder)] = holder, list(held)
                if not held:
                    self._empty.append(holder.target)
            if keys and len(held) <= MOST_COMPARED:
                quick = [key for key in keys if (id(holder.target), key) not in written]
                self._written += [(Location(holder, key), held[key]) for key in keys if key not in quick]
                if quick:
                    self._values.append(MetValues(holder, quick, [held[key] for key in quick]))
            absent = [key for target, key in written if target == id(holder.target) and key not in held]
            self._written += [(Location(holder, key), GONE) for key in absent if not of_object or key in names]
        owners = [holder.owner for holder, _ in contents if isinstance(holder, Attributes)]
        self._modules = [owner for owner in owners if isinstance(owner, nn.Module)]
        self._owners, self._types = owners, list(map(type, owners))
        self._forwards = Forwards(dict.fromkeys(self._types), self._names)
        self._methods = UnusedNames(namespace_of(Tensor), self._names)
        self._unpatched = [vars(module) for module in self._modules if "forward" not in vars(module)]
        self._open = [(holder, held.keys()) for holder, held in contents if _may_grow(holder)]
        """What may get attributes that it did not have, and that code asks for."""
        self._queries = [(query, query()) for name, query in _QUERIES.items() if name in self._names]
        self._watched = [*self._dicts_of(contents), self._methods, *self._forwards.watched]
        self._places = {(id(one.holder.target), key) for one in self._values for key in one.keys}
        self._writes_tensors = [place for place, before in self._written if isinstance(before, Tensor)]
        self.changed = set[tuple[int, Any]]()
        """What has broken a guard until now: see `_key`."""
        self.version = 0
        """Another number whenever a value may be another object than it was, or a tensor of another kind."""
        self._same = self._laid_out(None)

    def _dicts_of(self, contents: Iterable[tuple[Holder, Contents]]) -> list[DictCondition]:
        """The dicts, of which a version tells that nothing has changed."""
        values = {id(one.holder): one for one in self._values}
        known = {id(holder): keys for holder, keys in self._open}
        written = defaultdict[int, set[Any]](set)
        for place, _ in self._written:
            written[id(place.holder.target)].add(place.key)
        unpatched = set(map(id, self._unpatched))
        watched: list[DictCondition] = []
        for holder, held in contents:
            if not isinstance(plain_dict(holder), dict) or id(holder) in self._appending:
                continue
            asked: Set[Any] = frozenset()
            if id(holder) in known:
                asked = holder.used.keys() if isinstance(holder, Names) else self._names
                asked = asked | {"forward"} if id(holder.target) in unpatched else asked
            keys = self._counted.get(id(holder), (holder, None))[1]
            if id(holder) in values or asked or (held and keys is not None):
                of_others = {*held, *NEVER_READ, *written[id(holder.target)]}
                watched.append(WatchedDict(holder, values.get(id(holder)), keys, of_others, asked))
        return watched

    def _laid_out(self, versions: NDArray[np.int64] | None) -> SameObjects:
        """All values as they are expected now, for the quick comparison."""
        self.version += 1
        self._numbers: dict[int, int] | None = None
        self._numbered: list[Tensor] = []
        self._numbered_as = b""
        items = {id(item): item for values in self._values for item in values.expected}.values()
        self._tensors = [item for item in items if isinstance(item, Tensor)]
        self._arrays = [item for item in items if isinstance(item, np.ndarray)]
        for item in (*self._tensors, *self._arrays):
            self._known.setdefault(id(item), [item, form(item)])
        self._forms = [self._known[id(tensor)][1] for tensor in self._tensors]
        self._kinds: TensorKinds | None = None
        bare = [held for held in map(vars, self._tensors) if self._names.isdisjoint(held)]
        self._bare = [UnusedNames(held, self._names) for held in bare]
        whole = [(holder.target, keys) for holder, keys in self._whole()]
        classes = [(owner, CLASS, id(cls)) for owner, cls in zip(self._owners, self._types, strict=True)]
        facts = [*classes, *((cls, BASES, id(bases)) for cls, bases in self._forwards.bases)]
        versions = None if versions is None else versions[: len(self._watched)]
        return SameObjects(self._values, [*self._watched, *self._bare], whole, facts, versions)

    def _whole(self) -> Iterable[tuple[Holder, list[Any]]]:
        """The holders in which nothing but these keys may be, in this order if it is a dict."""
        return (one for identity, one in self._counted.items() if identity not in self._appending)

    def broken(self) -> str:
        """What does not hold any more, in a few words; "" if all holds."""
        queried = [query() for query, _ in self._queries]
        for (query, before), now in zip(self._queries, queried, strict=True):
            if now != before:
                return f"torch.{query.__name__}() is {now}, and was {before}"
        reason = "" if self._same.hold() else self._of_other_classes() or self._in_another_place() or self._compare()
        if not reason and (self._written or self._conditions):
            reason = next(chain(self._written_otherwise(), self._conditions_broken()), "")
        return reason or self._of_another_form()

    def _of_other_classes(self) -> str:
        """What has another class or other methods than it had, or attributes that it had not; "" if nothing has."""
        if list(map(type, self._owners)) != self._types:
            return "an object is of another class than it was"
        if not self._forwards.holds():
            return "a class has another forward than it had, or another method"
        if any(self._empty):
            return f"{next(filter(None, self._empty))!r} was empty"
        for one in self._bare:
            if not one.holds():
                return f"a tensor has attributes that it had not: {', '.join(one.target)}"
        return "" if self._methods.holds() else "a method of torch.Tensor is another than it was"

    def _in_another_place(self) -> str:
        """What is in a container or in an object and was not there, or in another order; "" if nothing is."""
        if any("forward" in attributes for attributes in self._unpatched):
            return "a module has another forward than it had"
        for holder, keys in self._whole():
            if len(holder.target) != len(keys):
                return f"{holder.path} has {len(holder.target)} elements, and had {len(keys)}"
            if isinstance(holder.target, dict) and list(holder.target) != keys:
                return f"{holder.path} has its keys in another order than it had"
        for holder, known in self._open:
            asked = holder.used.keys() if isinstance(holder, Names) else self._names
            new = (holder.target.keys() & asked) - known - NEVER_READ
            if new:
                new -= {place.key for place, _ in self._written if place.holder.target is holder.target}
            if new:
                return f"{holder.name(min(new))} was not there"
        return ""

    def _written_otherwise(self) -> Iterator[str]:
        """What the program itself writes, and what stands there now is not what it has met."""
        for place, before in self._written:
            target = place.holder.target
            held = target if type(target) is dict and isinstance(place.holder, Items) else place.holder.get()
            now = held.get(place.key, GONE)
            if not self._equal(now, before):
                self.changed.add(_key(place))
                yield f"{place} is {brief(now)}, and was {brief(before)}"

    def _conditions_broken(self) -> Iterator[str]:
        return filter(None, (condition.broken() for condition in self._conditions))

    def _of_another_form(self) -> str:
        """Which tensor or array is not what it was; "" if all are."""
        if self._kinds is None or not self._kinds.kept(self._tensors):
            with torch._C.DisableTorchFunctionSubclass():  # DTensors answer slowly otherwise
                forms = list(map(form, self._tensors))
            for now, before in zip(forms, self._forms, strict=True):
                if now != before:
                    return f"a tensor is {now}, and was {before}"
            self._kinds = TensorKinds(self._tensors)
            self.version += 1
        for array in self._arrays:
            if form(array) != self._known[id(array)][1]:
                return f"an array of shape {array.shape} has other values than it had"
        return ""

    def numbers(self, tensors: Sequence[Tensor]) -> tuple[int | None, ...]:
        """For each tensor the number of that of the model's which it is; () where none is one."""
        # a parameter that moves is replaced in the list, and another tensor may get the identity of the old one
        if self._numbers is None or _identities(self._numbered) != self._numbered_as:
            held = [item for one in self._values for item in one.expected]
            self._numbers = {id(item): number for number, item in enumerate(held) if isinstance(item, Tensor)}
            self._numbered = list({id(item): item for item in held if isinstance(item, Tensor)}.values())
            self._numbered_as = _identities(self._numbered)
        known = self._numbers
        if self._writes_tensors:
            held = ((place.holder.target, place) for place in self._writes_tensors)
            now = (
                target.get(place.key) if type(target) is dict else place.holder.get().get(place.key)
                for target, place in held
            )  # fmt: skip
            known = known | {id(item): -1 - number for number, item in enumerate(now) if isinstance(item, Tensor)}
        given = list(map(id, tensors))
        return () if known.keys().isdisjoint(given) else tuple(map(known.get, given))

    def knows(self, target: Any, key: Any) -> bool:
        """Whether what stands under a key of a container, or in a variable, is compared with what was there."""
        return (id(target), key) in self._places

    def holds(self, value: Any) -> bool:
        """Whether a container or an object is one in which the code may read something."""
        return id(value) in self._held

    @contextmanager
    def as_captured(self) -> Generator[None]:
        """In here, what the trace has met stands where it stood, so that another trace is one of the same call."""
        with ExitStack() as stack:
            stack.enter_context(as_captured(self._values_asked))
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
                    self.changed.add((id(values.holder.target), key))
                    return f"{name} is gone" if now is GONE else f"{name} is {brief(now)}, and was {brief(expected)}"
                if isinstance(now, Tensor) and (
                    old_to_new.setdefault(id(expected), id(now)) != id(now)
                    or new_to_old.setdefault(id(now), id(expected)) != id(expected)
                ):
                    return f"{values.holder.name(key)} is tied to other places than it was"
                if now is not expected and id(expected) in self._known:
                    self._known[id(now)] = [now, self._known.pop(id(expected))[1]]
            values.take(contents)
        self._same = self._laid_out(self._same.versions)
        return ""

    def _equal(self, now: Any, expected: Any, deep: int = 8) -> bool:
        """Whether a value may stand for another one that the trace has seen."""
        if now is expected:
            return True
        if type(now) is not type(expected) or not deep:
            return False
        if isinstance(now, (Tensor, np.ndarray)):
            return bool(form(now) == self._known.get(id(expected), [None, form(expected)])[1])
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
} | {"inference_mode": torch.is_inference_mode_enabled}
"""Functions of torch that tell something of the process or of the thread, by what code names that depends on them."""

MOST_COMPARED = 100_000
"""Elements of a container that are compared one by one; of more, their number is."""


def _is_read(kind: str, held: Contents, names: Collection[str]) -> bool:
    """Whether a call of a module, or code with these `names`, reads a registry of it. Which hooks get keywords matters
    where there are hooks, and nobody but `state_dict` runs the hooks of `state_dict`."""
    if kind.endswith(("_with_kwargs", "_always_called")):
        return bool(held) or kind in names
    return "state_dict" not in kind or not {kind, "state_dict", "load_state_dict"}.isdisjoint(names)


def _may_grow(holder: Holder) -> bool:
    of_module = isinstance(holder, Names) and isinstance(holder.target, dict)
    return of_module or (isinstance(holder, Attributes) and not holder.whole)


def _identities(values: Sequence[Any]) -> bytes:
    return np.fromiter(map(id, values), np.int64, len(values)).tobytes()


def _key(place: Location) -> tuple[int, Any]:
    return id(place.holder.target), place.key
