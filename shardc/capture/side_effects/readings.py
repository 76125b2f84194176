"""What forward asks of the world outside: the time, and numbers that are never the same. Every run asks anew.

    self.started = time.time()                  # a Reading in a trace; in every run what time.time() says then
    self.ids.append(uuid.uuid4().hex)           # a Reading of another one
    self.seconds = time.time() - self.started   # CaptureError: no part of a compiled program takes time on its own

What is asked before the first operator is asked before the run, all else behind it.
"""

from __future__ import annotations

import datetime
import operator
import os
import secrets
import sys
import threading
import time
import timeit
import uuid
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from unittest.mock import patch

from shardc.capture.side_effects.reachable import Reachable
from shardc.capture.user_frames import at_line, is_installed
from shardc.errors import CaptureError

_OF_ITS_MOMENT = {"localtime": 0, "gmtime": 0, "ctime": 0, "asctime": 0, "strftime": 1}
"""Functions of `time` that ask for the time where they get no more arguments than these."""

_ASKING: dict[Any, tuple[str, ...]] = {
    time: (
        *(f"{name}{unit}" for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time")
          for unit in ("", "_ns")), *_OF_ITS_MOMENT,
    ),
    timeit: ("default_timer",),
    uuid: ("uuid1", "uuid4"),
    os: ("urandom",),
    secrets: ("token_bytes", "token_hex", "token_urlsafe", "randbelow", "randbits"),
}  # fmt: skip


class Asked:
    """A question to the world: the function, and whether it is asked before the first operator."""

    def __init__(self, function: Callable[[], Any], name: str, early: bool) -> None:
        self.function, self.name, self.early = function, name, early


class Reading:
    """An answer that is another one in every run: `formula` makes it of what `asked` says. `value` is that of the
    trace, which nobody may read."""

    __slots__ = ("asked", "formula", "value")

    def __init__(self, asked: Asked, value: Any, formula: Callable[[Any], Any] = lambda value: value) -> None:
        self.asked, self.value, self.formula = asked, value, formula

    @property
    def __class__(self) -> type:  # type: ignore[override]  # for isinstance
        return type(self.value)

    def reads(self, *_: Any, **__: Any) -> NoReturn:
        """Raise CaptureError: code asks for the answer itself."""
        line = at_line(sys._getframe(1))
        raise CaptureError(
            f"forward computes with what {self.asked.name} says{line}: a compiled program would use the answer of its "
            "trace at every call, and runs no part of the model on its own. Ask outside of the model, or keep the "
            "answer as it is"
        )

    def of(self, function: Callable[[Any], Any]) -> Reading:
        """What a function makes of the answer."""
        formula = self.formula
        return Reading(self.asked, function(self.value), lambda answer: function(formula(answer)))

    def computed(self, function: Callable[[Any, Any], Any], other: Any, swapped: bool) -> Reading:
        """The result of an operation with a number that does not change."""
        if type(other) not in (bool, int, float):
            self.reads()
        return self.of(lambda answer: function(other, answer) if swapped else function(answer, other))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.of(operator.attrgetter(name))

    def __call__(self, *args: Any, **kwargs: Any) -> Reading:
        if any(type(one) not in (bool, int, float, str, bytes) for one in (*args, *kwargs.values())):
            self.reads()
        return self.of(lambda method: method(*args, **kwargs))

    __hash__ = reads  # type: ignore[assignment]
    __bool__ = __int__ = __float__ = __index__ = __complex__ = __str__ = __repr__ = __format__ = __bytes__ = reads
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __len__ = __iter__ = __getitem__ = __contains__ = reads
    __round__ = __trunc__ = __floor__ = __ceil__ = __divmod__ = __rdivmod__ = __reduce__ = __reduce_ex__ = reads


def _operation(function: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Reading, Any], Reading]:
    return lambda reading, other: reading.computed(function, other, swapped)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Reading, f"__{_name}__", _operation(getattr(operator, _name), False))
    setattr(Reading, f"__r{_name}__", _operation(getattr(operator, _name), True))


def put_in_place(stack: ExitStack, reachable: Reachable, stand_ins: Iterable[tuple[Any, str, Any]]) -> None:
    """Let the user's code find stand-ins for functions of modules, given as module, name and stand-in: in the module,
    under the name by which it was imported, and where an object holds it."""
    known: dict[int, Any] = {}
    for module, name, stand_in in stand_ins:
        value = getattr(module, name)
        known.setdefault(id(value), stand_in)
        for place in reachable.places(value):
            stack.callback(place.set, value)
            place.set(stand_in)
        if name in reachable.names:
            stack.enter_context(patch.object(module, name, stand_in))
    for space in reachable.spaces():
        own = {name: known[id(space[name])] for name in reachable.names & space.keys() if id(space[name]) in known}
        if own:
            stack.enter_context(patch.dict(space, own))


@contextmanager
def asked_anew(reachable: Reachable, computed: Callable[[], bool]) -> Generator[None]:
    """In here, code of the user's in this thread gets readings. `computed` tells whether an operator was called."""
    thread = threading.get_ident()

    def asking(function: Callable[..., Any], name: str, most: int | None = None) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            theirs = is_installed(sys._getframe(1).f_code.co_filename)
            if theirs or threading.get_ident() != thread or (most is not None and len(args) > most):
                return function(*args, **kwargs)
            return Reading(Asked(lambda: function(*args, **kwargs), name, not computed()), function(*args, **kwargs))

        return ask

    stand_ins: list[tuple[Any, str, Any]] = []
    for module, named in _ASKING.items():
        for name in named:
            most = _OF_ITS_MOMENT.get(name) if module is time else None
            stand_ins.append((module, name, asking(getattr(module, name), f"{module.__name__}.{name}", most)))
    if not reachable.names.isdisjoint(_OF_DATES):
        kinds = (datetime.datetime, datetime.date)
        stand_ins += [(datetime, kind.__name__, _asking_class(kind, asking)) for kind in kinds]
    with ExitStack() as stack:
        put_in_place(stack, reachable, stand_ins)
        yield


_OF_DATES = ("now", "utcnow", "today")
"""What classes of dates ask."""


def _asking_class(real: Any, asking: Callable[..., Callable[..., Any]]) -> Any:
    """What stands in for a class of dates: its objects are those of the class, but for what day or time it is now."""

    def instance_check(_: type, value: Any) -> bool:
        return isinstance(value, real)

    def subclass_check(_: type, kind: type) -> bool:
        return issubclass(kind, real)

    def call(_: type, *args: Any, **kwargs: Any) -> Any:
        return real(*args, **kwargs)

    methods = {"__instancecheck__": instance_check, "__subclasscheck__": subclass_check, "__call__": call}
    kind: Any = type(f"Kind{real.__name__}", (type(real),), methods)
    names = [name for name in _OF_DATES if hasattr(real, name)]
    own = {name: staticmethod(asking(getattr(real, name), f"{real.__name__}.{name}")) for name in names}
    return kind(real.__name__, (real,), own)
