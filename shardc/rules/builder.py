"""What decompositions build with: a graph to add operators to, and the sizes of what is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from shardc.graph import value_of
from shardc.runtime.random import bernoulli

aten = torch.ops.aten
LOW = (torch.float16, torch.bfloat16)
"""Types in which torch's kernels sum in float32."""


class Builder:
    """Adds operators to a graph before `node`, with their fake values and the provenance of `node`."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self._graph = graph
        self._node = node

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        new = self._graph.call_function(target, args, kwargs)
        new.meta.update({k: v for k, v in self._node.meta.items() if k in ("module", "source", "phase")})
        values = fx.map_arg((args, kwargs), value_of)
        new.meta["val"] = target(*values[0], **values[1])
        return new

    def mask(self, x: fx.Node, keep: float) -> fx.Node:
        """What eager dropout draws for `x`: it draws in the order in which `x` lies in memory."""
        value = value_of(x)
        shape, strides = [int(n) for n in value.shape], [int(n) for n in torch.empty_like(value).stride()]
        more = {} if value.is_contiguous() else {"strides": strides}
        new = self._graph.call_function(bernoulli, (shape, keep), {"dtype": value.dtype, **more})
        new.meta.update({k: v for k, v in self._node.meta.items() if k in ("module", "source", "phase")})
        new.meta["val"] = value.new_empty(shape)
        return new

    def full(self, like: fx.Node, shape: Sequence[int], value: float, dtype: torch.dtype | None = None) -> fx.Node:
        """A constant on the device of `like`, in its type unless another is given."""
        fake = value_of(like)
        keywords = {"dtype": dtype or fake.dtype, "device": fake.device}
        new = self._graph.call_function(aten.full.default, (list(shape), value), keywords)
        new.meta.update({k: v for k, v in self._node.meta.items() if k in ("module", "source", "phase")})
        new.meta["val"] = fake.new_zeros(list(shape), dtype=dtype or fake.dtype)
        return new

    def zeros(self, like: fx.Node, shape: Sequence[int]) -> fx.Node:
        return self.full(like, shape, 0)

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        return x if value_of(x).dtype == dtype else self(aten._to_copy.default, x, dtype=dtype)

    def wide(self, x: fx.Node) -> fx.Node:
        """`x` in the type in which torch's kernels compute with it."""
        return self.cast(x, torch.float32) if value_of(x).dtype in LOW else x


def dims_of(x: fx.Node, dims: Any) -> list[int]:
    rank = value_of(x).dim()
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def count_of(x: fx.Node, dims: Sequence[int]) -> int:
    return math.prod(int(value_of(x).shape[d]) for d in dims)
