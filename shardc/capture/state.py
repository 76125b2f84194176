"""The state of a model while it is captured: each tensor once, where it stands, and what restores the model afterwards.

self.table = torch.ones(8)      # no buffer, but forward reads it: a CONSTANT whose value goes into every run
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from shardc.capture.side_effects.holders import Contents, Holder, Library, Location
from shardc.capture.side_effects.reachable import PLAIN, Reachable
from shardc.capture.side_effects.snapshot import Change, Snapshot
from shardc.capture.unsupported_parts import refuse_replaced_methods
from shardc.capture.user_frames import at_line
from shardc.errors import CaptureError
from shardc.ir.program import Port, Role


@dataclasses.dataclass(frozen=True)
class StateEntry:
    """One argument of the traced function: its port, its fake tensor, the places where it stands, and the `owners` that
    hold it, each as a module and the name in its registry."""

    port: Port
    fake: Tensor
    places: tuple[Location, ...] = ()
    owners: tuple[tuple[nn.Module, str], ...] = ()


class State:
    """The tensors of a model, each once, and what restores all that its code can reach.

    `tied` maps further names of a tensor to its first. `standing` are the places of tensors that are neither parameters
    nor buffers. `objects` are further things that the call hands to the model, by name. `changing` is what others
    change from call to call, each as the identity of a container and a key in it.
    """

    def __init__(
        self,
        module: nn.Module,
        objects: Iterable[tuple[str, Any]] = (),
        changing: Collection[tuple[int, Any]] = (),
    ) -> None:
        self.module, self.changing = module, changing
        self.reachable = Reachable([("model", module), *objects])
        self._patched = self.before = Snapshot(self.reachable.holders)
        names = self.reachable.names
        refuse_replaced_methods(names)
        self.libraries = Snapshot(Library(space, names, PLAIN) for space in self.reachable.libraries.values())
        self.tied: dict[str, str] = {}
        self.names: dict[int, tuple[Role, str]] = {}
        self.tensors: dict[int, Tensor] = {}
        self.owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for role in (Role.PARAMETER, Role.BUFFER):
            for path, part in module.named_modules(remove_duplicate=False):
                for key, tensor in registry(part, role).items():
                    if tensor is not None:
                        self._add(role, f"{path}.{key}" if path else key, part, key, tensor)
        self.standing: dict[str, Location] = {}
        for places in self.reachable.tensors.values():
            tensor = places[0].get()
            if id(tensor) not in self.names and _is_plain(tensor):
                name = f"constant:{len(self.standing)}"
                self.names[id(tensor)], self.tensors[id(tensor)] = (Role.CONSTANT, name), tensor
                self.standing[name] = places[0]

    def _add(self, role: Role, name: str, part: nn.Module, key: str, tensor: Tensor) -> None:
        known = self.names.setdefault(id(tensor), (role, name))
        if known[1] != name:
            self.tied[name] = known[1]
        self.tensors[id(tensor)] = tensor
        self.owners.setdefault(id(tensor), []).append((part, key))

    def slots(self, fake: Callable[[Tensor], Tensor]) -> list[StateEntry]:
        """An entry for every tensor, parameters first; `fake` makes the fake tensor of each."""
        places = self.reachable.tensors
        return [
            StateEntry(
                Port(role, name), fake(self.tensors[key]), tuple(places.get(key, ())), tuple(self.owners.get(key, ()))
            )
            for key, (role, name) in self.names.items()
        ]

    def contents(self) -> list[tuple[Holder, Contents]]:
        """All that the code can read, as it was before the trace."""
        return [*self.before.contents(), *self.libraries.contents()]

    def stop_iterators(self) -> None:
        """Put objects in the places of iterators that refuse to go on: nobody could set them back."""
        for place in self.reachable.iterators:
            place.set(Stopped(str(place)))

    @contextmanager
    def traced(self) -> Generator[None]:
        """Trace in here, with all patches in place. At the end, everything that the code of the model can reach is as
        it is now."""
        self._patched = Snapshot(self.reachable.holders)
        try:
            yield
        finally:
            self._patched.restore()

    @contextmanager
    def unchanged(self) -> Generator[None]:
        """Run the model in here. At the end, what it has changed is put back."""
        try:
            yield
        finally:
            self._patched.restore()

    def left(self) -> list[Change]:
        """What was changed since `traced` outside of `unchanged`, and is put back now."""
        return self._patched.restore()


class Stopped:
    """Stands in for an iterator in a trace."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __iter__(self) -> Stopped:
        return self

    def __next__(self) -> NoReturn:
        self.refuse()

    def __getattr__(self, name: str) -> NoReturn:
        self.refuse()

    def refuse(self) -> NoReturn:
        """Raise CaptureError for the line that wants a value."""
        line = at_line(sys._getframe(2))
        raise CaptureError(
            f"forward uses {self._path}, an iterator or a file{line}: a compiled program would use the same value at "
            "every call. Use it outside of the model, and pass values in"
        )


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor that a model merely refers to can go into the program as a value of every run."""
    return type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.requires_grad


def registry(part: nn.Module, role: Role) -> dict[str, Tensor | None]:
    """The parameters or buffers of one module by name, to read and to write. (`setattr` would refuse a fake tensor.)"""
    return vars(part)["_parameters" if role is Role.PARAMETER else "_buffers"]
