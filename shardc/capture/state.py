"""The state of a model while it is captured: each tensor once, and what restores the model afterwards."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from shardc.capture.repeated_layers import EVERY
from shardc.ir.program import Port, Role
from shardc.runtime.mesh.parameters import RECORD


@dataclasses.dataclass(frozen=True)
class StateEntry:
    """One argument of the traced function: its port, its fake tensor, and the `owners` that hold it, each as a module
    and the name in its registry."""

    port: Port
    fake: Tensor
    owners: tuple[tuple[nn.Module, str], ...] = ()


class State:
    """The tensors of a model, each once, and what restores the model to what it was.

    `left` names the attributes, by module path, that the model changed while it was captured. `tied` maps further
    names of a tensor to its first.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.left: dict[str, None] = {}
        self.tied: dict[str, str] = {}
        self.names: dict[int, tuple[Role, str]] = {}
        self.tensors: dict[int, Tensor] = {}
        self.owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for role in (Role.PARAMETER, Role.BUFFER):
            for path, part in module.named_modules(remove_duplicate=False):
                for key, tensor in registry(part, role).items():
                    if tensor is not None:
                        self._add(role, f"{path}.{key}" if path else key, part, key, tensor)

    def _add(self, role: Role, name: str, part: nn.Module, key: str, tensor: Tensor) -> None:
        known = self.names.setdefault(id(tensor), (role, name))
        if known[1] != name:
            self.tied[name] = known[1]
        self.tensors[id(tensor)] = tensor
        self.owners.setdefault(id(tensor), []).append((part, key))

    def slots(self, fake: Callable[[Tensor], Tensor]) -> list[StateEntry]:
        """An entry for every tensor, parameters first; `fake` makes the fake tensor of each."""
        return [
            StateEntry(Port(role, name), fake(self.tensors[key]), tuple(self.owners[key]))
            for key, (role, name) in self.names.items()
        ]

    @contextmanager
    def unchanged(self) -> Generator[None]:
        """At the end, undo what the model did to its attributes in here, and note it in `left`."""
        parts = [(path, part, dict(vars(part))) for path, part in self.module.named_modules()]
        values = [value for *_, attributes in parts for value in attributes.values()]
        containers = [
            (value, copy.copy(value) if value else None) for value in values if isinstance(value, _CONTAINERS)
        ]
        try:
            yield
        finally:
            # most are empty, and stay so
            refilled = {
                id(value) for value, before in containers if (value if before is None else _differ(value, before))
            }
            for path, part, before in parts:
                now = vars(part)
                same = list(now) == list(before) and all(map(operator.is_, now.values(), before.values()))
                if same and refilled.isdisjoint(map(id, now.values())):
                    continue
                for name in (*now, *(name for name in before if name not in now)):
                    old, new = before.get(name, _ABSENT), now.get(name, _ABSENT)
                    flag = name.startswith("_") and isinstance(new, bool)  # tells that something was set up
                    if name not in _KEPT_BY_TORCH and not flag and (_differ(old, new) or id(new) in refilled):
                        self.left.setdefault(f"{path}.{name}" if path else name)
                now.clear()
                now.update(before)
            for value, before in containers:
                _refill(value, before or ())


_CONTAINERS = (dict, list, set)
_KEPT_BY_TORCH = frozenset({*EVERY, "_flat_weights", "_flat_weight_refs", "_shardc", RECORD})
"""Attributes that torch and shardc keep in every module, or in recurrent ones."""
_ABSENT = object()


def _differ(old: Any, new: Any) -> bool:
    """Whether two values differ. Containers are compared element by element, tensors by identity."""
    if old is new or type(old) is not type(new):
        return old is not new
    if isinstance(old, dict):
        return list(old) != list(new) or any(_differ(old[key], new[key]) for key in old)
    if isinstance(old, (list, tuple)):
        return len(old) != len(new) or any(_differ(a, b) for a, b in zip(old, new, strict=True))
    try:
        return isinstance(old, Tensor) or bool(old != new)
    except Exception:  # values that cannot be compared count as different
        return True


def _refill(value: Any, before: Any) -> None:
    value.clear()
    value.extend(before) if isinstance(value, list) else value.update(before)


def registry(part: nn.Module, role: Role) -> dict[str, Tensor | None]:
    """The parameters or buffers of one module by name, to read and to write. (`setattr` would refuse a fake tensor.)"""
    return vars(part)["_parameters" if role is Role.PARAMETER else "_buffers"]
