"""One call of a model: what is to be captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardc.errors import ShardcError

Inputs = tuple[Any, ...] | Mapping[str, Any]
"""Example inputs: positional ones, or keywords."""

Dynamic = Mapping[str, Mapping[int, str]]
"""Per argument the names of its dims that change from call to call."""

Dims = Mapping[int, Mapping[int, str]]
"""Per flat input the names of its dynamic dims. An int is a number that changes: the dim 0 of its input is its name."""


@dataclass(frozen=True)
class ModelCall:
    """One call of a model: its arguments, the flat outputs that get a gradient (None: by default), and the function
    that is captured (None: the model as a whole, its own hooks included).

    `grad` tells whether gradients are on where the model is called; that forward may turn them on for itself is why a
    call without them may have a backward. `changing` is what is known to change from call to call, each as the identity
    of a container and a key in it.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    differentiable: frozenset[int] | None = None
    function: Callable[..., Any] | None = None
    grad: bool = True
    changing: frozenset[tuple[int, Any]] = frozenset()

    @staticmethod
    def of(model: nn.Module, example_inputs: Inputs) -> ModelCall:
        """The call with positional inputs (a tuple) or keyword inputs (a mapping). Raises ShardcError for what is
        neither."""
        if isinstance(example_inputs, Mapping):
            return ModelCall(model, (), dict(example_inputs))
        if isinstance(example_inputs, (tuple, list)):  # pyright: ignore[reportUnnecessaryIsInstance] - types may lie
            return ModelCall(model, tuple(example_inputs), {})
        raise ShardcError(
            f"the inputs are a {type(example_inputs).__name__}; give a tuple of the model's arguments, like (x,), or a "
            "dict of its keywords"
        )

    @property
    def device(self) -> str:
        """The type of the device of the model: that of its first parameter or buffer, or else of its first input."""
        given = (leaf for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor))
        return next((one.device.type for one in chain(self.model.parameters(), self.model.buffers(), given)), "cpu")

    def without_arguments(self) -> ModelCall:
        """The same call without the user's tensors, so that whoever keeps it does not keep them."""
        return replace(self, args=(), kwargs={})

    @property
    def rows(self) -> int:
        """The size of dim 0 of the first tensor that has dims; 0 where none has."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return next((int(leaf.shape[0]) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 0)

    def example(self, rows: Callable[[int], int] = int) -> ModelCall:
        """The same call with tensors that hold no memory, and `rows(n)` where the first tensor has n in dim 0, in all
        tensors that have as many."""
        leaves, spec = pytree.tree_flatten((self.args, dict(self.kwargs)))
        first = self.rows

        def alike(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            grown = leaf.dim() and leaf.shape[0] == first
            shape = (rows(first), *leaf.shape[1:]) if grown else leaf.shape
            return torch.empty(shape, dtype=leaf.dtype, device="meta", requires_grad=leaf.requires_grad)

        args, kwargs = pytree.tree_unflatten([alike(leaf) for leaf in leaves], spec)
        return replace(self, args=args, kwargs=kwargs)


SHARDED_FROM = "_sharded_from"
"""Where the class of a sharded object holds the class that it had."""


def unsharded(kind: type) -> type:
    """The class as the user wrote it."""
    return vars(kind).get(SHARDED_FROM, kind)


def size_of(leaf: Any, dim: int) -> int:
    """The size of a dim of a flat input; of an int, the number itself."""
    return int(leaf.shape[dim]) if isinstance(leaf, Tensor) else leaf
