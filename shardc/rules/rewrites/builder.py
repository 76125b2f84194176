"""The builder by which decompositions add operators to a graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from shardc.ir.facts import Captured, describe, origin_of
from shardc.ir.program import call, frozen, value_of, where
from shardc.runtime.kernels import random
from shardc.runtime.kernels.mersenne import STATE
from shardc.runtime.kernels.streams import SEED
from shardc.runtime.kernels.widening import LOW

aten = torch.ops.aten


class Values:
    """The fake values of calls. Equal layers have equal calls, so their values are computed once."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Any, Any]] = {}

    def __call__(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = target, frozen(args), frozen(kwargs)
        if key not in self._made:
            inputs = fx.map_arg((args, kwargs), value_of)
            self._made[key] = (
                target(*inputs[0], **inputs[1]),
                inputs,
            )  # keep the inputs alive, because keys use their identities
        return self._made[key][0]


class Builder:
    """Adds operators to a graph before `node`, with their fake values and the provenance of `node`. What they draw is
    the single device's stream, or `independent` of it."""

    def __init__(self, graph: fx.Graph, node: fx.Node, values: Values, *, independent: bool = False) -> None:
        self._graph = graph
        self._node = node
        self._values = values
        self.independent = independent

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        value = self._values(target, args, kwargs)  # first, so that a call which raises leaves no node
        new = call(self._graph, target, args, kwargs)
        self._describe(new, value)
        return new

    def _describe(self, new: fx.Node, value: Any) -> None:
        describe(new, Captured(value, origin_of(self._node)))

    @property
    def result(self) -> Any:
        """The fake value of the operator that is being replaced."""
        return value_of(self._node)

    @property
    def place(self) -> str:
        """The place in the user's code of the operator that is being replaced."""
        return where(self._node)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function of the runtime, whose results have the shapes and dtypes of the replaced operator's."""
        new = call(self._graph, function, args, kwargs)
        self._describe(new, self.result)
        return new

    def item(self, several: fx.Node, index: int) -> fx.Node:
        """One of several results."""
        return self(operator.getitem, several, index)

    def draw(
        self, distribution: str, *parameters: float, dtype: torch.dtype | None = None,
        strides: Sequence[int] | None = None, shape: Sequence[int] | None = None,
    ) -> fx.Node:  # fmt: skip
        """Random numbers of `shape`, or of the shape of the result.

        Eager mode draws in the order of its result's memory. `strides` are those of that result if they are not those
        of the replaced operator's.
        """
        like: torch.Tensor = self.result[0] if isinstance(self.result, tuple) else self.result
        shape, dtype = [int(n) for n in like.shape] if shape is None else list(shape), dtype or like.dtype
        if self.independent:
            new = self.run(random.draw_from, self.seed(like), shape, distribution, *parameters, dtype=dtype)
        else:
            laid_out = _strides(like, shape, strides)
            new = self.run(random.draw, shape, distribution, *parameters, dtype=dtype, **laid_out)
        self._describe(new, like.new_empty(shape, dtype=dtype))
        return new

    def bernoulli(
        self, probability: float, *, dtype: torch.dtype | None = None, strides: Sequence[int] | None = None
    ) -> fx.Node:
        """Bernoulli numbers of the shape of the result, in `dtype`; `strides` are as for `draw`. Unlike those of other
        distributions, they may be drawn again."""
        like: torch.Tensor = self.result[0] if isinstance(self.result, tuple) else self.result
        shape, dtype = [int(n) for n in like.shape], dtype or like.dtype
        if self.independent:
            return self.draw("bernoulli", probability, dtype=dtype)
        state = self.state(like, shape)
        keywords = {"dtype": dtype, **({} if dtype == like.dtype else {"drawn": like.dtype})}
        keywords |= _strides(like, shape, strides)
        new = self.run(random.bernoulli, state, shape, probability, **keywords)
        self._describe(new, like.new_empty(shape, dtype=dtype))
        return new

    def state(self, like: torch.Tensor, shape: Sequence[int]) -> fx.Node:
        """The state of the generator from which Bernoulli numbers of `shape` are drawn, into the type of `like`."""
        new = self.run(random.bernoulli_state, list(shape), dtype=like.dtype)
        self._describe(new, like.new_empty(STATE, dtype=torch.uint8))
        return new

    def seed(self, like: torch.Tensor) -> fx.Node:
        """A seed of its own."""
        new = self.run(random.fresh_seed)
        self._describe(new, like.new_empty(SEED, dtype=torch.uint8))
        return new

    def full(self, like: fx.Node, shape: Sequence[int], value: float, dtype: torch.dtype | None = None) -> fx.Node:
        """A constant on the device of `like`, in `dtype` or that of `like`."""
        fake = value_of(like)
        keywords = {"dtype": dtype or fake.dtype, "device": fake.device}
        new = call(self._graph, aten.full.default, (list(shape), value), keywords)
        self._describe(new, fake.new_zeros(list(shape), dtype=dtype or fake.dtype))
        return new

    def zeros(self, like: fx.Node, shape: Sequence[int]) -> fx.Node:
        return self.full(like, shape, 0)

    def view(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """A view of `x`, or of a copy if the strides of eager mode do not allow one."""
        try:
            return self(aten.view.default, x, list(shape))
        except (RuntimeError, ValueError):
            copy = self(aten.clone.default, x, memory_format=torch.contiguous_format)
            return self(aten.view.default, copy, list(shape))

    def arange(self, like: fx.Node, count: int) -> fx.Node:
        """0 to `count` - 1 on the device of `like`."""
        fake = value_of(like)
        keywords = {"dtype": torch.int64, "device": fake.device}
        new = call(self._graph, aten.arange.default, (count,), keywords)
        self._describe(new, fake.new_zeros([count], dtype=torch.int64))
        return new

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        return x if value_of(x).dtype == dtype else self(aten._to_copy.default, x, dtype=dtype)

    def wide(self, x: fx.Node) -> fx.Node:
        """`x` in the dtype in which torch's kernels compute with it."""
        return self.cast(x, torch.float32) if value_of(x).dtype in LOW else x


def _strides(like: torch.Tensor, shape: Sequence[int], strides: Sequence[int] | None) -> dict[str, list[int]]:
    """The keyword `strides` of a draw, where it needs one; None stands for those of `like`."""
    asked = [int(n) for n in (like.stride() if strides is None else strides)]
    plain = asked == [int(n) for n in torch.empty(shape, device="meta").stride()]
    return {} if plain else {"strides": asked}


def dims_of(x: fx.Node, dims: Any) -> list[int]:
    """`dims` of `x`, counted from the front; all dims for None and []."""
    rank = value_of(x).dim()
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def count_of(x: fx.Node, dims: Sequence[int]) -> int:
    """The number of global elements along `dims`."""
    return math.prod(int(value_of(x).shape[d]) for d in dims)
