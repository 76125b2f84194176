"""Which inputs of a call are the model's own parameters and buffers, or views of them: a trace has one tensor for both.

own = OwnTensors(model)
own.numbers([x, model.table, model.table[:4]])      # (None, 2, 2)
own.numbers([x])                                    # ()
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, count
from typing import Any

from torch import Tensor, nn

from shardc.capture.torch_patches.module_internals import dict_version

_HELD = ("_parameters", "_buffers", "_modules")


class OwnTensors:
    """The parameters and buffers of a model. They are looked for again where a registry of the model has changed."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._empty, self._registries, self._versions = list[Registry](), list[Registry](), list[int]()
        self._numbers = dict[int, int]()

    def numbers(self, tensors: Sequence[Tensor]) -> tuple[int | None, ...]:
        """For each tensor the number of the model's that it is, or is a view of; () where none is one."""
        self._registries.copy()  # brings all into the processor's cache at once
        if any(self._empty) or not self._versions or list(map(dict_version, self._registries)) != self._versions:
            self._look()
        given = [id(tensor if tensor._base is None else tensor._base) for tensor in tensors]
        return () if self._numbers.keys().isdisjoint(given) else tuple(map(self._numbers.get, given))

    def _look(self) -> None:
        parts = [vars(part) for part in self._module.modules()]
        parameters, buffers, modules = ([part[held] for part in parts] for held in _HELD)
        self._empty = [held for held in (*parameters, *buffers, *modules) if not held]
        self._registries = [held for held in (*parameters, *buffers, *modules) if held]
        self._versions = list(map(dict_version, self._registries))
        tensors = chain.from_iterable(map(dict.values, (*parameters, *buffers)))
        self._numbers = dict(zip(map(id, tensors), count(), strict=False))
        self._numbers.pop(id(None), None)


Registry = dict[str, Any]
