"""Things with contents that code can change: the attributes of an object, a dict, a list, a set, a closure's cell.

model.seen = [1]        # Attributes(model): {"seen": [1]};  Elements(model.seen): {0: 1}
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import CellType
from typing import Any

from shardc.errors import ShardcError

Contents = dict[Any, Any]
"""What a holder holds, by key: an attribute's name, a dict's key, an index."""


class Holder:
    """Something that holds values. `path` says where it is, as the user would write it: `model.config`.

    No `ABC`, of which every `isinstance` is a call of Python code: a walk asks of thousands of holders what they are.
    """

    def __init__(self, target: Any, path: str) -> None:
        self.target = target
        self.path = path

    def get(self) -> Contents:
        """A copy of the contents."""
        raise NotImplementedError

    def put(self, contents: Mapping[Any, Any]) -> None:
        """Make these the contents, in this order."""
        raise NotImplementedError

    def set(self, key: Any, value: Any) -> None:
        """Put one value in the place of another."""
        self.put({**self.get(), key: value})

    def name(self, key: Any) -> str:
        """How the user would write the place of a value."""
        return f"{self.path}[{key!r}]"


class Items(Holder):
    """The items of a dict. Of a subclass, what a plain dict would show."""

    def __init__(self, target: dict[Any, Any], path: str) -> None:
        super().__init__(target, path)
        self._kind: Any = OrderedDict if isinstance(target, OrderedDict) else dict

    def get(self) -> Contents:
        return dict(self._kind.items(self.target))

    def put(self, contents: Mapping[Any, Any]) -> None:
        self._kind.clear(self.target)
        for key, value in contents.items():
            self._kind.__setitem__(self.target, key, value)

    def set(self, key: Any, value: Any) -> None:
        self._kind.__setitem__(self.target, key, value)


class Attributes(Items):
    """The attributes in the `__dict__` of an object."""

    def __init__(self, owner: Any, path: str, whole: bool = False) -> None:
        super().__init__(vars(owner), path)
        self.owner, self.whole = owner, whole
        """`whole`: code reads all attributes, not only those that it names."""

    def name(self, key: Any) -> str:
        return f"{self.path}.{key}"


class Registry(Items):
    """What a module holds by name: its parameters, buffers, children, or hooks. `kind` is the registry's own name."""

    def __init__(self, target: dict[Any, Any], path: str, kind: str) -> None:
        super().__init__(target, path)
        self.kind = kind

    def name(self, key: Any) -> str:
        return f"{self.path}.{key}"


class Slots(Holder):
    """The attributes of an object with `__slots__`."""

    def __init__(self, owner: Any, path: str) -> None:
        super().__init__(owner, path)
        self.owner = owner
        slots = [name for cls in type(owner).__mro__ for name in _slots(cls)]
        self._slots = [name for name in slots if name not in ("__dict__", "__weakref__")]

    def get(self) -> Contents:
        return {name: getattr(self.target, name) for name in self._slots if hasattr(self.target, name)}

    def put(self, contents: Mapping[Any, Any]) -> None:
        for name in self._slots:
            if name in contents:
                object.__setattr__(self.target, name, contents[name])
            elif hasattr(self.target, name):
                object.__delattr__(self.target, name)

    def name(self, key: Any) -> str:
        return f"{self.path}.{key}"


def _slots(cls: type) -> Sequence[str]:
    slots: Any = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


class Elements(Holder):
    """The elements of a list or a deque."""

    def get(self) -> Contents:
        return dict(enumerate(self.target))

    def put(self, contents: Mapping[Any, Any]) -> None:
        self.target.clear()
        self.target.extend(contents.values())

    def set(self, key: Any, value: Any) -> None:
        self.target[key] = value


class Members(Holder):
    """The members of a set, each under itself."""

    def get(self) -> Contents:
        return {member: member for member in self.target}

    def put(self, contents: Mapping[Any, Any]) -> None:
        self.target.clear()
        self.target.update(contents.values())


class Names(Holder):
    """Those of the names in a namespace (globals, or the attributes of a class) that code uses."""

    def __init__(self, owner: Any, path: str) -> None:
        super().__init__(owner, path)
        self.used: dict[str, None] = {}
        self._first = frozenset(self._space())

    def _space(self) -> Mapping[str, Any]:
        return self.target if isinstance(self.target, dict) else vars(self.target)

    def get(self) -> Contents:
        space = self._space()
        new = [] if len(space) == len(self._first) else [name for name in space if name not in self._first]
        new = [name for name in new if not name.startswith("__")]  # Python's own, like what it has warned of
        return {name: space[name] for name in (*self.used, *new) if name in space}

    def put(self, contents: Mapping[Any, Any]) -> None:
        now = self.get()
        for name in dict.fromkeys((*self.used, *now, *contents)):
            if name in contents and (name not in now or now[name] is not contents[name]):
                self.set(name, contents[name])
            elif name in now and name not in contents:
                self._delete(name)

    def set(self, key: Any, value: Any) -> None:
        if isinstance(self.target, dict):
            self.target[key] = value
        else:
            setattr(self.target, key, value)

    def _delete(self, name: str) -> None:
        if isinstance(self.target, dict):
            del self.target[name]
        else:
            delattr(self.target, name)

    def name(self, key: Any) -> str:
        return f"{self.path}.{key}"


class Bytes(Holder):
    """The bytes of an array or a bytearray, as one value. An array of objects, or a very large one, seems empty."""

    def __init__(self, target: Any, path: str) -> None:
        super().__init__(target, path)
        self._last = b""

    def get(self) -> Contents:
        try:
            view = memoryview(self.target)
            if view.nbytes > MOST_BYTES or view.format == "O":
                return {}
            now = view.tobytes()
        except (BufferError, ValueError, TypeError):
            return {}
        if now != self._last:  # so that equal contents are one object
            self._last = now
        return {0: self._last}

    def put(self, contents: Mapping[Any, Any]) -> None:
        if contents and self.get().get(0) is not contents[0]:
            if isinstance(self.target, bytearray):
                self.target[:] = contents[0]
            else:
                memoryview(self.target).cast("B")[:] = contents[0]
            self._last = contents[0]

    def name(self, key: Any) -> str:
        return self.path


MOST_BYTES = 1 << 20
"""Larger arrays are compared by identity: to read them at every call would take too long."""

_EMPTY = object()


class Library(Holder):
    """Those of the functions and plain values of a library's module that code names. It is never put back."""

    def __init__(self, module: Any, names: Collection[str], plain: tuple[type, ...]) -> None:
        super().__init__(vars(module), module.__name__)
        self._used = [name for name in names if callable(value := self.target.get(name)) or isinstance(value, plain)]

    def get(self) -> Contents:
        return {name: self.target[name] for name in self._used if name in self.target}

    def put(self, contents: Mapping[Any, Any]) -> None: ...

    def name(self, key: Any) -> str:
        return f"{self.path}.{key}"


class Cell(Holder):
    """The variable of an enclosing function."""

    target: CellType

    def get(self) -> Contents:
        try:
            return {0: self.target.cell_contents}
        except ValueError:
            return {}

    def put(self, contents: Mapping[Any, Any]) -> None:
        if contents:
            self.target.cell_contents = contents[0]
        elif self.get():
            del self.target.cell_contents

    def set(self, key: Any, value: Any) -> None:
        self.target.cell_contents = value

    def name(self, key: Any) -> str:
        return self.path


class Environment(Holder):
    """Those of the process's variables that code names, None where one is not set."""

    def __init__(self) -> None:
        super().__init__(vars(os.environ)["_data"], "os.environ")  # the items of os.environ are made when they are read
        self.used: dict[Any, None] = {}

    def use(self, name: str) -> None:
        """Code names a variable."""
        self.used[vars(os.environ)["encodekey"](name)] = None

    def get(self) -> Contents:
        return {name: self.target.get(name) for name in self.used}

    def put(self, contents: Mapping[Any, Any]) -> None:
        for name, value in contents.items():
            if value is not self.target.get(name):
                os.environ.pop(os.fsdecode(name), None)
                if value is not None:
                    os.environ[os.fsdecode(name)] = os.fsdecode(value)

    def name(self, key: Any) -> str:
        return f"{self.path}[{os.fsdecode(key)!r}]"


class ContextValue(Holder):
    """The value of a context variable."""

    target: ContextVar[Any]

    def get(self) -> Contents:
        value = value_of_variable(self.target)
        return {} if value is _EMPTY else {0: value}

    def put(self, contents: Mapping[Any, Any]) -> None:
        for value in contents.values():
            self.target.set(value)

    def name(self, key: Any) -> str:
        return self.path


def value_of_variable(variable: ContextVar[Any], none: Any = _EMPTY) -> Any:
    """The value of a context variable, or its default; `none` where it has neither."""
    try:
        return variable.get()
    except LookupError:
        return none


@dataclass(frozen=True)
class Location:
    """Where a value stands: under a key of a holder."""

    holder: Holder
    key: Any

    def __str__(self) -> str:
        return self.holder.name(self.key)

    @property
    def container(self) -> Any:
        """What the holder stands for."""
        return self.holder.target

    def get(self) -> Any:
        """The value that stands there now. Raises ShardcError where there is none any more."""
        contents = self.holder.get()
        if self.key not in contents:
            raise ShardcError(f"{self} is gone, but the compiled program reads it: assign it again")
        return contents[self.key]

    def set(self, value: Any) -> None:
        self.holder.set(self.key, value)


class Within(Holder):
    """The elements of a tuple that stands in a place: to set one is to put another tuple there."""

    def __init__(self, place: Location, path: str) -> None:
        super().__init__(place, path)
        self._place = place

    def get(self) -> Contents:
        return dict(enumerate(self._place.get()))

    def put(self, contents: Mapping[Any, Any]) -> None:
        old = self._place.get()
        values = list(contents.values())
        self._place.set(type(old)(*values) if hasattr(old, "_fields") else type(old)(values))


def holder_of(value: Any, path: str) -> Holder | None:
    """What holds the contents of a container; None for what cannot change, and for objects."""
    if isinstance(value, dict):
        return Items(value, path)
    if isinstance(value, (list, deque)):
        return Elements(value, path)
    return Members(value, path) if isinstance(value, set) else None
