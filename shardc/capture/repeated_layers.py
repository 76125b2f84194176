"""Repeated layers: children of a module that are equal but for the values of their parameters.

    layers  0 1 2 3 4 5 6 7    all alike: run 0, units 1 and 2, and 7; skip 3 to 6
    layers  s f s f s f s f    of two kinds in turn: run 0, units (1 2) and (3 4), and 7; skip 5 and 6

Equal layers have the same class, the same hyperparameters and the same shapes, no hooks, and share nothing with
anything else. `shardc.capture.skipped_layers` checks that they also run alike. `shardc.capture.stitch` fills in what
was skipped.
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
    """A layer does not repeat another one after all. The caller traces the model in full."""


@dataclass(frozen=True)
class Repeat:
    """Equal layers among the children of one module.

    Units of `period` layers begin at child `start`. The child before them and at least one after them, up to `stop`,
    are equal too. They run, because a model's first and last layers have other neighbours. `positions` are the
    attributes, per child, that hold a layer's position.
    """

    paths: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    start: int
    stop: int
    period: int
    positions: tuple[tuple[tuple[nn.Module, str], ...], ...]

    @property
    def units(self) -> int:
        """How many units there are, those that are skipped among them."""
        return (self.stop - 1 - self.start) // self.period

    @property
    def hole(self) -> range:
        """The children that are skipped."""
        return range(self.start + 2 * self.period, self.start + self.units * self.period)


class Itself:
    """An object that equals itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def snapshot(value: Any, deep: int = 3) -> Any:
    """A key of a value: two values with equal keys are alike, and stay alike while the keys stay equal. Objects are
    compared by identity, and by what their attributes hold."""
    kind = type(value)
    if kind in PLAIN or isinstance(value, Enum):
        return kind, value
    if not deep or isinstance(value, (Tensor, type)):
        return Itself(value)
    if kind is functools.partial:
        return kind, *(snapshot(item, deep - 1) for item in (value.func, value.args, value.keywords))
    if kind in (list, tuple):
        return kind, tuple(snapshot(item, deep - 1) for item in value)
    if isinstance(value, dict):
        items = tuple((snapshot(k, deep - 1), snapshot(v, deep - 1)) for k, v in value.items())  # type: ignore[misc]
        return kind, items if kind in (dict, OrderedDict) else (Itself(value), items)
    if kind in (set, frozenset):
        return kind, frozenset(snapshot(item, deep - 1) for item in value)
    return Itself(value), tuple((k, snapshot(v, 0)) for k, v in getattr(value, "__dict__", {}).items())


def form(tensor: Tensor | None) -> tuple[Any, ...]:
    """All of a tensor but its values."""
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
    """A key of everything in a layer but the values of its tensors and its whole numbers; and where the whole numbers
    are.

    With `ours`, the layer is being traced: its forward is replaced by shardc's, and its tensors by fake ones, whose
    type is another.
    """
    parts: list[Any] = []
    whole: Whole = []
    for path, part in layer.named_modules():
        facts: list[Any] = [path, type(part)]
        for name, value in vars(part).items():
            if name in EVERY and not value:
                continue
            if name == "_modules":
                facts.append(tuple((key, child is None) for key, child in value.items()))
            elif name in ("_parameters", "_buffers"):
                facts.append(tuple([(key, form(tensor)[ours:]) for key, tensor in value.items()]))
            elif name.endswith("_hooks") and isinstance(value, dict):
                if value:
                    facts.append(Itself(object()))  # who knows what a hook does
            elif type(value) is int:
                facts.append(name)
                whole.append((part, name))
            elif not (ours and part is layer and name == "forward"):
                facts.append((name, snapshot(value)))
        parts.append(tuple(facts))
    return tuple(parts), whole


def find(module: nn.Module, patterns: Iterable[str] = ()) -> list[Repeat]:
    """The repeated layers of a model. Stretches with a layer that a pattern of `patterns` names are left out; with
    hooks on all modules, all are."""
    if has_global_hooks():
        return []
    owners = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    owners.update(id(tensor) for part in module.modules() for tensor in tensors(part))
    repeats: list[Repeat] = []
    below: tuple[str, ...] = ()
    for path, parent in module.named_modules():
        children = {f"{path}.{name}" if path else name: child for name, child in parent.named_children()}
        if len(children) < FEWEST_SKIPPED + 4 or f"{path}.".startswith(below):
            continue
        repeat = _repeat(children)
        if repeat is not None and not _shared(repeat, owners) and not _named(repeat, patterns):
            repeats.append(repeat)
            below = (*below, *(f"{layer}." for layer in repeat.paths))
    return repeats


def _repeat(children: dict[str, nn.Module]) -> Repeat | None:
    descriptions = [described(child) for child in children.values()]
    alike: dict[Any, list[int]] = {}
    for index, (what, _) in enumerate(descriptions):
        alike.setdefault(what, []).append(index)
    keys: list[Any] = [None] * len(descriptions)
    position_attributes: list[tuple[tuple[nn.Module, str], ...]] = [()] * len(descriptions)
    for number, members in enumerate(alike.values()):
        values = {i: [getattr(part, name) for part, name in descriptions[i][1]] for i in members}
        slots = range(len(values[members[0]]))
        position = {s for s in slots if len(members) > 1 and len({values[i][s] - i for i in members}) == 1}
        for i in members:
            keys[i] = number, tuple(values[i][s] for s in slots if s not in position)
            position_attributes[i] = tuple(descriptions[i][1][s] for s in sorted(position))
    best: Repeat | None = None
    for period in range(1, LONGEST_PERIOD + 1):
        for start, stop in _stretches(keys, period):
            one = Repeat(tuple(children), tuple(children.values()), start + 1, stop, period, tuple(position_attributes))
            if len(one.hole) > max(FEWEST_SKIPPED - 1, len(best.hole) if best else 0):
                best = one
    return best


def _stretches(keys: Sequence[Any], period: int) -> Iterable[tuple[int, int]]:
    """Where the keys repeat with this period: the index of the first layer of each stretch, and of its last."""
    start = 0
    for index in range(len(keys) + 1 - period):
        if index + period == len(keys) or keys[index] != keys[index + period]:
            if index > start:
                yield start, index + period
            start = index + 1


def _shared(repeat: Repeat, owners: Counter[int]) -> bool:
    """Whether a part or a tensor of the layers is used anywhere else as well."""
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
    """What the code of a layer may read besides the layer and its arguments: plain values and containers, in
    attributes of its classes, in globals and in closures."""
    readable: dict[Any, Any] = {}
    for kind in {type(part) for part in layer.modules()}:
        for cls in kind.__mro__:
            if not cls.__module__.startswith(("torch.", "builtins")):
                readable.update({(cls, name): value for name, value in vars(cls).items() if type(value) in _READABLE})
        for function in _wrapped(kind.forward):
            code, known = function.__code__, function.__globals__
            cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
            values = [(n, known.get(n)) for n in code.co_names] + [(n, _content(cell)) for n, cell in cells]
            readable.update({(function, name): value for name, value in values if type(value) in _READABLE})
    return {key: snapshot(value) for key, value in readable.items()}


_READABLE = (int, float, bool, str, list, dict, set)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


@functools.cache
def _wrapped(function: Any) -> tuple[FunctionType, ...]:
    """A function, and those that it wraps."""
    functions: list[FunctionType] = []
    while function is not None:
        if isinstance(function, FunctionType):
            functions.append(function)
        function = getattr(function, "__wrapped__", None)
    return tuple(functions)
