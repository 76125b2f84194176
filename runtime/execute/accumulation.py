"""Gradients that stay on the ranks over several backwards, and are reduced once.

    sums = GradientSums()
    executable.run(state, [x0], sums=sums)[0].backward()      each rank adds up its addends
    executable.run(state, [x1], sums=sums)[0].backward()
    sums.deliver()                                            one reduction; p.grad gets the sum

Until then a parameter whose gradient is missing something is *watched*: whoever reads or sets its `grad` gets it whole,
as on one device, since it is delivered first.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import graph

if TYPE_CHECKING:
    from shardc.runtime.execute.executable import Executable

_HELD = "_shardc_sums"
"""The attribute of a watched parameter that holds the `GradientSums` where its gradient is."""


class GradientSums:
    """What the ranks of this process have added up, by executable and by the name of the gradient."""

    def __init__(self) -> None:
        self._sums: dict[Executable, dict[str, list[Tensor]]] = {}
        self._owned: set[tuple[Executable, str]] = set()
        self._leaves: dict[Executable, dict[str, Tensor]] = {}

    def add(self, executable: Executable, parts: Mapping[str, Sequence[Tensor]], leaves: Mapping[str, Tensor]) -> None:
        """Add what one backward left: by name, the addend of each local rank, and the parameter it is for."""
        sums = self._sums.setdefault(executable, {})
        for name, addends in parts.items():
            if name not in sums:
                sums[name] = list(addends)
            elif (executable, name) in self._owned:
                for whole, addend in zip(sums[name], addends, strict=True):
                    whole.add_(addend)
            else:  # what backward returned may be a part of something else
                sums[name] = [whole + addend for whole, addend in zip(sums[name], addends, strict=True)]
                self._owned.add((executable, name))
            self._leaves.setdefault(executable, {})[name] = leaves[name]
            _watch(leaves[name], self)

    def deliver(self) -> None:
        """Reduce all sums, and add them to the gradients of the parameters. Under torch.distributed every rank must
        call it."""
        sums, leaves = self._sums, self._leaves
        self.drop()
        for executable, parts in sums.items():
            gradients = executable.reduced(parts)
            for name, gradient in gradients.items():
                leaf = leaves[executable][name]
                if leaf.requires_grad:
                    torch.autograd.backward([leaf], [executable.boundary.hand_over(gradient, type(leaf))])

    def drop(self) -> None:
        """Forget all sums. Gradients are what they were before."""
        for leaves in self._leaves.values():
            for leaf in leaves.values():
                _unwatch(leaf)
        self._sums, self._leaves, self._owned = {}, {}, set()


def deferred_leaves(leaves: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Which of these parameters the backward that runs now adds gradients to, without a hook that sees them; None where
    it returns gradients instead, as `torch.autograd.grad` does."""
    try:
        return {
            name: leaf
            for name, leaf in leaves.items()
            if not (leaf._backward_hooks or leaf._post_accumulate_grad_hooks)  # pyright: ignore[reportPrivateUsage]
            and torch._C._will_engine_execute_node(graph.get_gradient_edge(leaf).node)  # pyright: ignore
        }
    except RuntimeError:
        return None


class _Watched:
    """What a parameter's class has beyond its own while its gradient waits to be reduced."""

    __slots__ = ()

    @property
    def grad(self) -> Tensor | None:
        """The whole gradient, which is delivered first."""
        _delivered(self)
        return self.grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        _delivered(self)
        self.grad = value

    @grad.deleter
    def grad(self) -> None:
        _delivered(self)
        del self.grad

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        _delivered(self)
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _delivered(self)
        return self.__reduce_ex__(protocol)


def _delivered(parameter: Any) -> None:
    """Deliver what a watched parameter waits for. From then on it has its own class again."""
    vars(parameter)[_HELD].deliver()


def _watch(parameter: Tensor, sums: GradientSums) -> None:
    if _HELD not in vars(parameter):
        vars(parameter)[_HELD] = sums
        parameter.__class__ = _watched(type(parameter))


def _unwatch(parameter: Tensor) -> None:
    if vars(parameter).pop(_HELD, None) is not None:
        parameter.__class__ = type(parameter).__mro__[2]


@cache
def _watched(kind: type) -> Any:
    return type(kind)(kind.__name__, (_Watched, kind), {"__slots__": ()})
