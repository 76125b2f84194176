"""Measures the memory of tensors: all storages that calls of torch make while a `Meter` is on, in its thread, and those
it was shown, until they are freed."""

from __future__ import annotations

import threading
import weakref
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shardc.runtime.mesh.mesh import current


class Meter(TorchDispatchMode):
    """`held` bytes now and `peak` bytes at most."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: dict[int, Any] = {}
        self._lock = threading.RLock()  # a storage may be freed by any thread

    def show(self, values: Any, given: bool = True) -> None:
        """Count the storages of tensors that were there before (`given`), or are new."""
        for value in pytree.tree_leaves(values):
            if isinstance(value, Tensor) and not value.is_meta:
                # a rank's part of what is whole here may be a view of the whole
                self._count(value.untyped_storage(), value.nbytes if given else value.untyped_storage().nbytes())

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        number = storage._cdata
        with self._lock:
            if number in self._known:
                return
            self.held += size
            self.peak = max(self.peak, self.held)
            self._known[number] = weakref.ref(storage, lambda _: self._freed(number, size))

    def _freed(self, number: int, size: int) -> None:
        with self._lock:
            self.held -= size
            del self._known[number]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        # in a collective of a virtual mesh a rank looks at what belongs to others
        given = [x.untyped_storage() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        foreign = {storage._cdata for storage in given if storage._cdata not in self._known}
        mine = [x for x in pytree.tree_leaves(made) if isinstance(x, Tensor)]
        self.show([x for x in mine if x.untyped_storage()._cdata not in foreign], given=False)
        return made


def metered(module: ModuleType) -> dict[int, Meter]:
    """Make a generated module measure itself; per rank its meter."""
    meters: dict[int, Meter] = {}
    forward, backward = module.forward, getattr(module, "backward", None)

    def metered_forward(*given: Any) -> Any:
        meter = meters.setdefault(current().rank, Meter())
        meter.show(given)
        with meter:
            return forward(*given)

    def metered_backward(given: list[Any]) -> Any:
        meter = meters[current().rank]
        meter.show(given)
        with meter:
            return backward(given)  # type: ignore[misc]

    module.forward = metered_forward  # type: ignore[attr-defined]
    if backward is not None:
        module.backward = metered_backward  # type: ignore[attr-defined]
    return meters
