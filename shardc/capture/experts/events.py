"""The calls of torch's functions in a trace, by number, so that another trace of the same model finds them again.

x = F.linear(x, w)    # in layers.0.mlp, its fourth call    ->    TensorPlace(("layers.0.mlp", 3), 1) is w
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from shardc.capture.torch_patches.traced_nodes import added, node_of, traced_graph

Event = tuple[str, int]
"""A call: the module that makes it, and how many calls this has made before."""


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor stands: the number of an argument of a call, or of a result, counted from -1 down."""

    event: Event
    number: int


@dataclass
class Record:
    """What a trace has noted: where the value of a node can be had, which values are results of calls, and which nodes
    were made without gradients."""

    places: dict[fx.Node, list[TensorPlace]] = field(default_factory=dict[fx.Node, list[TensorPlace]])
    made: dict[fx.Node, Event] = field(default_factory=dict[fx.Node, Event])
    """The calls that return a value first, or write it into their first argument."""
    without_gradients: set[fx.Node] = field(default_factory=set[fx.Node])
    chooses: bool = False
    """Whether something chooses among experts, or among anything else."""


_CHOICES = frozenset(
    {"topk", "argmax", "argsort", "sort", "max", "scatter", "scatter_", "one_hot", "softmax", "sigmoid"}
)


class Events:
    """Numbers the calls of a trace, and notes their tensors. `replaced` may give another result for one."""

    def __init__(self) -> None:
        self._counts = Counter[str]()
        self.record = Record()
        self.taken: dict[TensorPlace, tuple[Tensor, int]] = {}
        """Tensors that are wanted, as they came, and how often they had been written by then."""

    def next(self, path: str) -> Event:
        """The number of the call that a module has begun last."""
        return path, self._counts[path] - 1

    def call(
        self, run: Callable[[], Any], name: str, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any],
        wanted: Mapping[Event, Iterable[int]],
    ) -> tuple[Event, Any]:  # fmt: skip
        """`run()`, which is a call with these arguments, and its number."""
        event = path, self._counts[path]
        self._counts[path] += 1
        graph = traced_graph()
        if graph is not None:
            self.record.chooses |= name in _CHOICES
            for number, tensor in enumerate(_tensors((args, kwargs))):
                self._note(tensor, TensorPlace(event, number))
        if event in wanted:
            self._take(event, _tensors((args, kwargs)), (n for n in wanted[event] if n >= 0))
        before = len(graph.nodes) if graph is not None else 0
        result = run()
        if graph is not None:
            for number, tensor in enumerate(_tensors(result)):
                node = self._note(tensor, TensorPlace(event, -1 - number))
                if node is not None and number == 0:
                    self.record.made.setdefault(node, event)
            if name == "__setitem__" and isinstance(args[0], Tensor) and (node := node_of(args[0])) is not None:
                self.record.made.setdefault(node, event)
            if not torch.is_grad_enabled():
                self.record.without_gradients.update(added(graph, before))
        if event in wanted:
            self._take(event, _tensors(result), (-1 - n for n in wanted[event] if n < 0), results=True)
        return event, result

    def _note(self, tensor: Tensor, place: TensorPlace) -> fx.Node | None:
        node = node_of(tensor)
        if node is not None:
            self.record.places.setdefault(node, []).append(place)
        return node

    def _take(self, event: Event, tensors: Iterator[Tensor], numbers: Iterable[int], *, results: bool = False) -> None:
        chosen = set(numbers)
        for number, tensor in enumerate(tensors):
            if number in chosen:
                place = TensorPlace(event, -1 - number if results else number)
                self.taken[place] = tensor, -1 if tensor.is_inference() else tensor._version


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
