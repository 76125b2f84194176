"""The state of a model while it is captured: each tensor once, and the model put back as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from contextlib import contextmanager

from torch import Tensor, nn

from shardc.graph import Port, Role


@dataclasses.dataclass(frozen=True)
class Slot:
    """One argument of the traced function: what it is, its fake, and the places in the model that hold it."""

    port: Port
    fake: Tensor
    places: tuple[tuple[nn.Module, str], ...] = ()


class State:
    """The tensors of a model, each once, and everything needed to put the model back as it was."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.tied: dict[str, str] = {}
        self.names: dict[int, tuple[Role, str]] = {}
        self.tensors: dict[int, Tensor] = {}
        self.places: dict[int, list[tuple[nn.Module, str]]] = {}
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
        self.places.setdefault(id(tensor), []).append((part, key))

    def slots(self, fake: Callable[[Tensor], Tensor]) -> list[Slot]:
        return [
            Slot(Port(role, name), fake(self.tensors[key]), tuple(self.places[key]))
            for key, (role, name) in self.names.items()
        ]

    @contextmanager
    def unchanged(self) -> Generator[None]:
        """Whatever the model does to its own attributes in here is undone at the end."""
        saved = [(part, dict(vars(part))) for part in self.module.modules()]
        inner = [(own, dict(own)) for _, own_vars in saved for own in own_vars.values() if isinstance(own, dict)]
        try:
            yield
        finally:
            for part, before in saved:
                vars(part).clear()
                vars(part).update(before)
            for own, before in inner:
                own.clear()
                own.update(before)


def registry(part: nn.Module, role: Role) -> dict[str, Tensor | None]:
    return vars(part)["_parameters" if role is Role.PARAMETER else "_buffers"]
