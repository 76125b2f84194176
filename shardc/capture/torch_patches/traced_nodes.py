"""The nodes of the graph that a trace is writing: which one a tensor stands for, and those that a call has added."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx

# what user code sees in a trace by AOTAutograd is wrapped, and torch has no public way to what it stands for
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot


def traced_graph() -> fx.Graph | None:
    """The graph that is being written; None while torch only looks at what the function does."""
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer.graph


def node_of(tensor: Tensor) -> fx.Node | None:
    """The node whose value a tensor is now."""
    mode = get_proxy_mode()
    if mode is None or not isinstance(tensor, FunctionalTensor):
        return None
    with torch._C.DisableTorchFunction():
        slot = get_proxy_slot(tensor.from_functional(), mode.tracer, None)
    return None if slot is None else slot.proxy.node  # type: ignore[attr-defined]


@contextmanager
def lists_asked(answer: Callable[[Tensor], tuple[list[Any]] | None]) -> Generator[None]:
    """In here, `x.tolist()` of a tensor of the trace is what `answer` knows: no function mode sees that it is asked."""
    tolist = FunctionalTensor.tolist

    def asked(tensor: FunctionalTensor) -> Any:
        known = answer(tensor)
        return tolist(tensor) if known is None else known[0]

    with patch.object(FunctionalTensor, "tolist", asked):
        yield


def added(graph: fx.Graph, before: int) -> Iterator[fx.Node]:
    """The nodes of a graph past the first `before`, which are the last ones."""
    node = graph._root
    for _ in range(len(graph.nodes) - before):
        node = node._prev
        yield node
