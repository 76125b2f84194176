"""What the code of a model can reach, found without running it.

    class Scaled(nn.Module):
        def forward(self, x):
            seen.append(self.config.tau)      # holders: model, model.config, the globals of the module, seen
            return x / self.config.tau

The walk starts at the modules and their hooks. An attribute of an object is followed where some code names it, and a
method is read where some code names it, too: so what forward never names (a trainer, a logger) stays outside. Code of
torch, of NumPy and of Python's library is not read, but for the attributes that torch's modules name.
"""

from __future__ import annotations

import functools
import itertools
import operator
import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shardc.capture.side_effects.code import (
    CONSTRUCTORS,
    free_names,
    imported,
    looks_up,
    may_construct,
    names,
    parts_of,
    pieces,
)
from shardc.capture.side_effects.computed_names import ComputedNames
from shardc.capture.side_effects.holders import (
    Attributes,
    Bytes,
    Cell,
    ContextValue,
    Environment,
    Holder,
    Location,
    Names,
    Registry,
    Slots,
    Within,
    holder_of,
)
from shardc.capture.side_effects.library_objects import MEMORY, insides, opens
from shardc.capture.torch_patches.module_internals import global_hooks
from shardc.capture.user_frames import is_known
from shardc.runtime.mesh.parameters import RECORD

PLAIN = (
    type(None), bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.device, torch.Size,
    torch.memory_format, torch.layout, np.generic, PurePath, type(Ellipsis), type(NotImplemented),
)  # fmt: skip
"""Values that do not change, and are compared by value."""

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)

_ALL_AT_ONCE = frozenset({"vars", "__dict__", "asdict"})
"""What code names that reads all attributes of an object."""

LONG = 100_000
"""Of containers with more elements, the elements are not looked into."""

_STATE = ("_parameters", "_buffers", "_modules")
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called")))
_OURS = frozenset({"_shardc", RECORD})
_CACHED = type(functools.lru_cache(lambda: None))  # type: ignore[arg-type]


class Reachable:
    """The holders that code can reach from `roots`, by name, and the places where tensors and cached functions stand.

    Everything found is kept alive, so that no two things have one id.
    """

    def __init__(self, roots: Iterable[tuple[str, Any]]) -> None:
        self.holders: list[Holder] = []
        self.tensors: dict[int, list[Location]] = {}
        self.cached: list[tuple[Location, Any]] = []
        """Functions with `functools.lru_cache`, and where they stand."""
        self.iterators: list[Location] = []
        self.generators: list[tuple[str, Any]] = []
        """Random generators of Python and NumPy, by name."""
        self.names: set[str] = set()
        self.libraries: dict[int, Any] = {id(space): space for space in (torch, nn.functional, Tensor)}
        """The modules of torch and the like that code names, by identity."""
        self._computed = ComputedNames()
        self._places: dict[int, list[Location]] = {}
        self._held: set[int] = set()
        self._whole: dict[type, bool] = {}
        self._seen: dict[Any, Any] = {}
        self._waiting: dict[str, list[Callable[[], None]]] = {}
        self._todo: deque[tuple[Any, str]] = deque()
        self._made: dict[type, list[tuple[Any, str]] | None] = {}
        """Constructors of classes of which objects were met; None where code may make another."""
        self._constructs = False
        for path, value in roots:
            self._todo.append((value, path))
        for name, hooks in global_hooks().items():
            self._registry(Registry(hooks, f"torch.nn.modules.module.{name}", name))
        while self._todo:
            while self._todo:
                self._visit(*self._todo.popleft())
            self._use(list(self._computed.named(self.holders)))
        if not self.names.isdisjoint(("environ", "getenv")):
            self._environment()

    def holds(self, value: Any) -> bool:
        """Whether the walk met this very object."""
        return id(value) in self._seen

    def _stands(self, holder: Holder, key: Any, value: Any) -> None:
        """A value was met in a place."""
        if type(value) in _ATOMS:
            return
        place = Location(holder, key)
        if isinstance(value, Tensor):
            if vars(value) and id(value) not in self._seen:
                attributes = Attributes(value, holder.name(key))
                self.holders.append(attributes)
                self._attributes(attributes, vars(value))
            self._seen[id(value)] = value
            self.tensors.setdefault(id(value), []).append(place)
        elif isinstance(value, tuple) and len(value) <= LONG:
            self._seen[id(value)] = value
            within = Within(place, holder.name(key))
            for index, item in enumerate(value):
                self._stands(within, index, item)
        elif isinstance(value, Iterator) and type(value) not in weakref.ProxyTypes:
            self.iterators.append(place)
        elif isinstance(value, _CACHED):
            self.cached.append((place, value))
            self._todo.append((value.__wrapped__, holder.name(key)))
        else:
            self._places.setdefault(id(value), []).append(place)
            self._todo.append((value, holder.name(key)))

    def places(self, value: Any) -> list[Location]:
        """Where an object stands; none if something else holds it, too, in which nothing can be put."""
        return [] if id(value) in self._held else self._places.get(id(value), [])

    def spaces(self) -> list[dict[str, Any]]:
        """The globals of all code."""
        return [one.target for one in self.holders if isinstance(one, Names) and isinstance(one.target, dict)]

    def _visit(self, value: Any, path: str) -> None:
        if isinstance(value, (*PLAIN, Enum)) or id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            return
        self._seen[id(value)] = value
        if type(value) in weakref.ProxyTypes:
            self._todo.append((value.__repr__.__self__, path))  # what it stands for
        elif isinstance(value, FunctionType):
            self._function(value, path)
        elif isinstance(value, MethodType):
            self._held.add(id(value.__self__))
            self._todo += [(value.__func__, path), (value.__self__, path)]
        elif isinstance(value, functools.partial):
            self._held.update(map(id, (*value.args, *value.keywords.values())))
            self._todo += [(part, path) for part in (value.func, value.args, value.keywords)]
        elif isinstance(value, (tuple, frozenset)):
            self._todo += [(part, f"{path}[{i}]") for i, part in enumerate(itertools.islice(value, LONG))]
        elif isinstance(value, property):
            self._todo += [(part, path) for part in (value.fget, value.fset, value.fdel) if part]
        elif isinstance(value, (classmethod, staticmethod)):
            self._todo.append((value.__func__, path))
        elif isinstance(value, functools.cached_property):
            self._todo.append((value.func, path))
        elif isinstance(value, weakref.ref):
            self._todo.append((value(), path))
        elif isinstance(value, type):
            self._class(value)
            self._construct(value.__mro__)
        elif isinstance(value, ModuleType):
            if is_known(getattr(value, "__file__", None) or "<frozen"):
                self.libraries[id(value)] = value
            else:
                self._attributes(Names(value, value.__name__), vars(value))
        elif isinstance(value, (operator.attrgetter, operator.methodcaller)):
            self._use(name for text in value.__reduce__()[1] if isinstance(text, str) for name in parts_of(text))
        elif isinstance(value, MEMORY):
            self.holders.append(Bytes(value, path))
        elif isinstance(value, GENERATORS):
            self.generators.append((path, value))
        elif isinstance(value, ContextVar):
            self._opened(ContextValue(value, path))
        elif isinstance(value, nn.Module):
            self._module(value, path)
        elif (holder := holder_of(value, path)) is not None:
            self._container(holder, value)
        elif isinstance(value, BuiltinFunctionType):  # a method such as `losses.append`
            self._held.add(id(value.__self__))
            self._todo.append((value.__self__, path))
        elif opens(type(value)):
            self._object(value, path)

    def _environment(self) -> None:
        variables = Environment()
        for name in self.names:
            if name.isupper():
                variables.use(name)
        self.holders.append(variables)

    def _container(self, holder: Holder, value: Any) -> None:
        self.holders.append(holder)
        if type(value).__module__ != "builtins":
            self._class(type(value))
        if len(value) <= LONG:
            for key, item in holder.get().items():
                self._stands(holder, key, item)
        if hasattr(value, "__dict__"):  # of a subclass
            self._object(value, holder.path)

    def _object(self, value: Any, path: str) -> None:
        self._class(type(value))
        if hasattr(value, "__dict__"):
            holder = Attributes(value, path, whole=self._reads_all(type(value)))
            self.holders.append(holder)
            self._attributes(holder, vars(value))
            self._use(insides(value))  # the library's own code, which is not read, names them
        elif not isinstance(value, Enum) and any("__slots__" in vars(cls) for cls in type(value).__mro__):
            slots = Slots(value, path)
            self.holders.append(slots)
            self._attributes(slots, slots.get())

    def _module(self, part: nn.Module, path: str) -> None:
        self._class(type(part))
        holder, attributes = Attributes(part, path, whole=self._reads_all(type(part))), vars(part)
        self.holders.append(holder)
        for name in (*_STATE, *_HOOKS):
            if isinstance(attributes.get(name), dict):
                self._registry(Registry(attributes[name], path if name in _STATE else holder.name(name), name))
        if "forward" in attributes:
            self._stands(holder, "forward", attributes["forward"])
        skipped = {*_STATE, *_HOOKS, *_OURS, "forward"}
        self._attributes(holder, {name: value for name, value in attributes.items() if name not in skipped})

    def _registry(self, registry: Registry) -> None:
        self._seen[id(registry.target)] = registry.target
        self._opened(registry)

    def _opened(self, holder: Holder) -> None:
        """A holder all of whose contents count."""
        self.holders.append(holder)
        for key, item in holder.get().items():
            self._stands(holder, key, item)

    def _attributes(self, holder: Holder, attributes: dict[str, Any]) -> None:
        """Follow the attributes that code names, now or as soon as it does."""
        for name, value in list(attributes.items()):
            if type(value) in _ATOMS and not isinstance(holder, Names):
                continue
            if isinstance(holder, Attributes) and holder.whole:
                self._attribute(holder, name)
                continue
            self._when(name, functools.partial(self._attribute, holder, name))
        if isinstance(holder, Names):
            self.holders.append(holder)

    def _attribute(self, holder: Holder, name: str) -> None:
        contents = vars(holder.target) if isinstance(holder, Names) and not isinstance(holder.target, dict) else None
        contents = holder.target if contents is None and isinstance(holder.target, dict) else contents
        value = contents.get(name, _GONE) if contents is not None else holder.get().get(name, _GONE)
        if value is _GONE:
            return
        if isinstance(holder, Names):
            if isinstance(value, (FunctionType, classmethod, staticmethod, property, type, ModuleType)):
                self._todo.append((value, holder.name(name)))
                return
            holder.used[name] = None
        self._stands(holder, name, value)

    def _when(self, name: str, then: Callable[[], None]) -> None:
        if name in self.names:
            then()
        else:
            self._waiting.setdefault(name, []).append(then)

    def _use(self, used: Iterable[str]) -> None:
        for name in used:
            if name not in self.names:
                self.names.add(name)
                for then in self._waiting.pop(name, ()):
                    then()

    def _class(self, cls: type) -> None:
        """The methods and the values that code names, in a class and its bases. Operators (`__len__`) need no name."""
        for base in cls.__mro__:
            if base in (object, nn.Module) or issubclass(base, Enum) or ("class", id(base)) in self._seen:
                continue
            self._seen["class", id(base)] = base
            file = getattr(sys.modules.get(base.__module__), "__file__", None) or "<frozen"
            if is_known(file):
                if issubclass(base, nn.Module):
                    self._use(_methods_names(base))
                continue
            space = Names(base, base.__qualname__)
            differentiates = issubclass(base, torch.autograd.Function)
            for name, value in vars(base).items():
                called = name == "forward" or name.startswith("__") or differentiates
                if called and isinstance(value, (FunctionType, staticmethod)):
                    method = value, f"{base.__qualname__}.{name}"
                    waiting = self._made.setdefault(base, []) if name in CONSTRUCTORS else None
                    (self._todo if waiting is None or self._constructs else waiting).append(method)
            self._attributes(space, {n: v for n, v in vars(base).items() if not n.startswith("__")})

    def _construct(self, classes: Iterable[type]) -> None:
        """Code may make objects of these classes: it reads what their constructors read."""
        for cls in list(classes):
            self._todo += self._made.get(cls) or ()
            self._made[cls] = None

    def _reads_all(self, kind: type) -> bool:
        """Whether a method of the user's goes through all attributes of an object."""
        if kind not in self._whole:
            methods = [m for base in kind.__mro__ for m in vars(base).values() if isinstance(m, FunctionType)]
            codes = [method.__code__ for method in methods if not is_known(method.__code__.co_filename)]
            self._whole[kind] = any(not _ALL_AT_ONCE.isdisjoint(free_names(code)) for code in codes)
        return self._whole[kind]

    def _function(self, function: FunctionType, path: str) -> None:
        code = function.__code__
        wrapped = vars(function)
        if is_known(code.co_filename) and not wrapped and code.co_filename != "<string>":
            closure = function.__closure__ or ()
            self._todo += [(cell.cell_contents, path) for cell in closure if _callable_in(cell)]
            return
        self._use(names(code))
        if may_construct(code) and not self._constructs:
            self._constructs = True
            self._construct(self._made)
        self._computed.looks_up |= looks_up(code)
        self._computed.all_at_once |= not _ALL_AT_ONCE.isdisjoint(free_names(code))
        self._computed.pieces |= pieces(code)
        self._todo += [(sys.modules.get(name), name) for name in imported(code)]
        space = self._globals(function)
        named = free_names(code)
        if "globals" in named:  # by whatever name
            named = named.union(name for name, value in function.__globals__.items() if isinstance(value, PLAIN))
        for name in named:
            if name not in space.used and not name.startswith("__"):
                known = function.__globals__.get(name, _GONE)
                if isinstance(known, (FunctionType, type, ModuleType)):
                    self._todo.append((known, name))
                else:  # also what is not there yet
                    space.used[name] = None
                    if known is not _GONE:
                        self._stands(space, name, known)
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            holder = Cell(cell, f"{variable} of {function.__qualname__}")
            if variable != "__class__" and id(cell) not in self._seen:  # that one is for super()
                self._seen[id(cell)] = cell
                self._opened(holder)
        self._todo += [(part, path) for part in (function.__defaults__, function.__kwdefaults__) if part]
        if wrapped:
            self._opened(Attributes(function, function.__qualname__))

    def _globals(self, function: FunctionType) -> Names:
        key = "globals", id(function.__globals__)
        if key not in self._seen:
            space = Names(function.__globals__, str(function.__globals__.get("__name__", "globals")))
            self._seen[key] = space
            self.holders.append(space)
        return self._seen[key]


_GONE = object()
_ATOMS = frozenset(kind for kind in PLAIN if kind not in (np.generic, PurePath))

_NAMES = weakref.WeakKeyDictionary[type, frozenset[str]]()  # every sharded model has a class of its own


def _methods_names(cls: type) -> frozenset[str]:
    """The attributes that the methods of one of torch's modules name."""
    if cls not in _NAMES:
        functions = [value for value in vars(cls).values() if isinstance(value, FunctionType)]
        _NAMES[cls] = frozenset(name for function in functions for name in names(function.__code__))
    return _NAMES[cls]


def _callable_in(cell: Any) -> bool:
    try:
        return callable(cell.cell_contents)
    except ValueError:
        return False
