"""Repeated layers: children of a module that are equal but for the values of their parameters.

    layers  0 1 2 3 4 5 6 7    all alike: run 0, units 1 and 2, and 7; skip 3 to 6
    layers  s f s f s f s f    of two kinds in turn: run 0, units (1 2) and (3 4), and 7; skip 5 and 6

Equal means: the same class with the same hyperparameters, the same shapes, no hooks, nothing shared with anything else.
`shardc.capture.skipped_layers` sees whether they also run alike, `shardc.capture.stitch` fills in what was skipped.
"""

from __future__ import annotations

import functools
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from shardc.capture.torch_patches.ambient_modes import unobserved
from shardc.capture.torch_patches.module_internals import has_global_hooks

LONGEST_PERIOD = 8
FEWEST_SKIPPED = 2

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class Unlike(Exception):
    """A layer turned out to be no repetition of another: the model is traced in full."""


@dataclass(frozen=True)
class Repeat:
    """Equal layers among the children of one module.

    Units of `period` layers begin at child `start`. The child before them and at least one after, up to `stop`, are
    equal too, but run, because a model's first and last layers meet other neighbours. `asked` are the attributes, per
    child, that hold a layer's position.
    """

    paths: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    start: int
    stop: int
    period: int
    asked: tuple[tuple[tuple[nn.Module, str], ...], ...]

    @property
    def units(self) -> int:
        return (self.stop - 1 - self.start) // self.period

    @property
    def hole(self) -> range:
        """The children that are skipped."""
        return range(self.start + 2 * self.period, self.start + self.units * self.period)


class _Itself:
    """An object that equals itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def snapshot(value: Any, deep: int = 3) -> Any:
    """Something that equals the snapshot of what is, and will be, no different. Objects count by identity, and what
    their attributes hold."""
    kind = type(value)
    if kind in PLAIN or isinstance(value, Enum):
        return kind, value
    if not deep or isinstance(value, (Tensor, type)):
        return _Itself(value)
    if kind is functools.partial:
        return kind, *(snapshot(item, deep - 1) for item in (value.func, value.args, value.keywords))
    if kind in (list, tuple):
        return kind, tuple(snapshot(item, deep - 1) for item in value)
    if isinstance(value, dict):
        items = tuple((snapshot(k, deep - 1), snapshot(v, deep - 1)) for k, v in value.items())  # type: ignore[misc]
        return kind, items if kind in (dict, OrderedDict) else (_Itself(value), items)
    if kind in (set, frozenset):
        return kind, frozenset(snapshot(item, deep - 1) for item in value)
    return _Itself(value), tuple((k, snapshot(v, 0)) for k, v in getattr(value, "__dict__", {}).items())


def form(tensor: Tensor | None) -> tuple[Any, ...]:
    if tensor is None:
        return ()
    with unobserved():
        return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def tensors(part: nn.Module) -> list[Tensor]:
    """The parameters and buffers that a module itself holds."""
    return [tensor for tensor in (*part._parameters.values(), *part._buffers.values()) if tensor is not None]


EVERY = frozenset(vars(nn.Module()))
"""The attributes that torch keeps in every module; most are empty."""
Whole = list[tuple[nn.Module, str]]
"""The attributes of a layer that hold whole numbers, one of which may be its position."""


def described(layer: nn.Module, ours: bool = False) -> tuple[Any, Whole]:
    """Everything that makes a layer what it is, but for the values of its tensors and its whole numbers. With `ours`,
    it is being traced: its forward is our own, and its tensors are of whatever type stands for them."""
    parts: list[Any] = []
    whole: Whole = []
    for path, part in layer.named_modules():
        own: list[Any] = [path, type(part)]
        for name, value in vars(part).items():
            if name in EVERY and not value:
                continue
            if name == "_modules":
                own.append(tuple((key, child is None) for key, child in value.items()))
            elif name in ("_parameters", "_buffers"):
                own.append(tuple([(key, form(tensor)[ours:]) for key, tensor in value.items()]))
            elif name.endswith("_hooks") and isinstance(value, dict):
                if value:
                    own.append(_Itself(object()))  # who knows what a hook does
            elif type(value) is int:
                own.append(name)
                whole.append((part, name))
            elif not (ours and part is layer and name == "forward"):
                own.append((name, snapshot(value)))
        parts.append(tuple(own))
    return tuple(parts), whole


def find(module: nn.Module, patterns: Iterable[str] = ()) -> list[Repeat]:
    """The repeated layers of a model. None where a pattern of `patterns` names one of them, or a hook sees them all."""
    if has_global_hooks():
        return []
    owners = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    owners.update(id(tensor) for part in module.modules() for tensor in tensors(part))
    found: list[Repeat] = []
    below: tuple[str, ...] = ()
    for path, parent in module.named_modules():
        children = {f"{path}.{name}" if path else name: child for name, child in parent.named_children()}
        if len(children) < FEWEST_SKIPPED + 4 or f"{path}.".startswith(below):
            continue
        repeat = _repeat(children)
        if repeat is not None and not _shared(repeat, owners) and not _named(repeat, patterns):
            found.append(repeat)
            below = (*below, *(f"{layer}." for layer in repeat.paths))
    return found


def _repeat(children: dict[str, nn.Module]) -> Repeat | None:
    made = [described(child) for child in children.values()]
    alike: dict[Any, list[int]] = {}
    for index, (what, _) in enumerate(made):
        alike.setdefault(what, []).append(index)
    keys: list[Any] = [None] * len(made)
    asked: list[tuple[tuple[nn.Module, str], ...]] = [()] * len(made)
    for number, members in enumerate(alike.values()):
        values = {i: [getattr(part, name) for part, name in made[i][1]] for i in members}
        slots = range(len(values[members[0]]))
        position = {s for s in slots if len(members) > 1 and len({values[i][s] - i for i in members}) == 1}
        for i in members:
            keys[i] = number, tuple(values[i][s] for s in slots if s not in position)
            asked[i] = tuple(made[i][1][s] for s in sorted(position))
    best: Repeat | None = None
    for period in range(1, LONGEST_PERIOD + 1):
        for start, stop in _stretches(keys, period):
            one = Repeat(tuple(children), tuple(children.values()), start + 1, stop, period, tuple(asked))
            if len(one.hole) > max(FEWEST_SKIPPED - 1, len(best.hole) if best else 0):
                best = one
    return best


def _stretches(keys: Sequence[Any], period: int) -> Iterable[tuple[int, int]]:
    """Where the keys repeat themselves with this period: first and last but one of each stretch."""
    start = 0
    for index in range(len(keys) + 1 - period):
        if index + period == len(keys) or keys[index] != keys[index + period]:
            if index > start:
                yield start, index + period
            start = index + 1


def _shared(repeat: Repeat, owners: Counter[int]) -> bool:
    """Whether a part or a tensor of the layers stands anywhere else as well."""
    return any(
        owners[id(item)] > 1
        for layer in repeat.layers[repeat.start - 1 : repeat.stop]
        for part in layer.modules()
        for item in (part, *tensors(part))
    )


def _named(repeat: Repeat, patterns: Iterable[str]) -> bool:
    paths = [
        f"{path}.{below}".rstrip(".")
        for path, layer in zip(repeat.paths, repeat.layers, strict=True)
        for below, _ in layer.named_modules()
    ]
    return any(fnmatchcase(path, pattern) for pattern in patterns for path in paths)


def surroundings(layer: nn.Module) -> Any:
    """What the code of a layer finds beside the layer and its arguments: plain values, or containers of them, in
    attributes of its classes, in globals and in closures."""
    found: dict[Any, Any] = {}
    for kind in {type(part) for part in layer.modules()}:
        for cls in kind.__mro__:
            if not cls.__module__.startswith(("torch.", "builtins")):
                found.update({(cls, name): value for name, value in vars(cls).items() if type(value) in _READABLE})
        for function in _wrapped(kind.forward):
            code, known = function.__code__, function.__globals__
            cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
            values = [(n, known.get(n)) for n in code.co_names] + [(n, _content(cell)) for n, cell in cells]
            found.update({(function, name): value for name, value in values if type(value) in _READABLE})
    return {key: snapshot(value) for key, value in found.items()}


_READABLE = (int, float, bool, str, list, dict, set)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


@functools.cache
def _wrapped(function: Any) -> tuple[FunctionType, ...]:
    """A function, and those that it wraps."""
    found: list[FunctionType] = []
    while function is not None:
        if isinstance(function, FunctionType):
            found.append(function)
        function = getattr(function, "__wrapped__", None)
    return tuple(found)
