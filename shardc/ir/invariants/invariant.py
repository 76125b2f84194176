"""What an invariant is, and what it is asked about.

    @invariant
    def names_are_unique(checked: Checked) -> Iterator[Broken]:
        \"\"\"No two nodes have the same name.\"\"\"
        ...

The function's name and its docstring are what errors and docs show. It yields the nodes at which it does not hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import fx

from shardc.ir.facts import FACTS, Captured, ChosenStrategy, lowered
from shardc.ir.layout import Layout
from shardc.ir.mesh import Mesh
from shardc.ir.partition import Partition, partition
from shardc.ir.program import Port, Program, Role, value_of

T = TypeVar("T")


class Broken(NamedTuple):
    """Where an invariant does not hold, and what is wrong there: a node, or a line of the generated code."""

    at: fx.Node | int
    text: str


class Checked:
    """A program after a pass, as invariants read it; what several of them need is worked out once.

    `program` has the ports, and is what was captured; `source` is the generated code, once there is any.
    """

    def __init__(self, graph: fx.Graph, program: Program, mesh: Mesh, source: str = "") -> None:
        self.graph, self.program, self.mesh, self.source = graph, program, mesh, source
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.known: dict[Hashable, Any] = {}

    @cached_property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.nodes if node.op == "placeholder"]

    @cached_property
    def output(self) -> fx.Node:
        return self.graph.output_node()

    @cached_property
    def results(self) -> list[fx.Node | None]:
        """The values of the output tuple."""
        return list(self.output.args[0])  # type: ignore[arg-type]

    @cached_property
    def calls(self) -> list[fx.Node]:
        return [node for node in self.nodes if node.op == "call_function"]

    @cached_property
    def operators(self) -> list[tuple[fx.Node, ChosenStrategy]]:
        """The operators of a lowered program, with their strategies."""
        chosen = ((node, lowered(node).operator) for node in self.calls)
        return [(node, strategy) for node, strategy in chosen if strategy is not None]

    @cached_property
    def operands(self) -> dict[fx.Node, list[fx.Node]]:
        """What every node reads, as often as it reads it, in order."""
        return {node: list(arguments_of((node.args, node.kwargs))) for node in self.nodes}

    @cached_property
    def device(self) -> torch.device:
        """Where the model was when it was captured."""
        for node in self.placeholders:
            facts = node.meta[FACTS]
            origin = node if isinstance(facts, Captured) else facts.base[0]
            if isinstance(value_of(origin), torch.Tensor):
                return value_of(origin).device
        return torch.device("cpu")

    @cached_property
    def inputs(self) -> list[tuple[Port, fx.Node]]:
        return list(zip(self.program.inputs, self.placeholders, strict=True))

    @cached_property
    def outputs(self) -> list[tuple[Port, fx.Node]]:
        """Those that there are: a gradient that nobody needs is None."""
        ports = zip(self.program.outputs, self.results, strict=True)
        return [(port, node) for port, node in ports if node is not None]

    @cached_property
    def by_name(self) -> dict[str, fx.Node]:
        """The placeholders of parameters, buffers and inputs: those that gradients and mutations name."""
        named = (Role.PARAMETER, Role.BUFFER, Role.INPUT)
        return {port.name: node for port, node in self.inputs if port.role in named}

    @cached_property
    def forward_and_backward(self) -> Partition:
        """Forward and backward of a lowered program."""
        return partition(self.graph, self.program)

    def simple(self, layout: Layout) -> Layout:
        """The layout with as few atoms as express it, to compare."""
        return layout.simplify(self.mesh)

    def lies_as(self, one: Layout, other: Layout) -> bool:
        return one is other or self.simple(one) == self.simple(other)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once a key."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def layout(self, node: fx.Node) -> Layout | None:
        """The layout of a lowered node; None where it has several results."""
        return lowered(node).layout


@dataclass(frozen=True)
class Invariant:
    """What holds of every program after some pass."""

    name: str
    sentence: str
    broken: Callable[[Checked], Iterator[Broken]]


def invariant(function: Callable[[Checked], Iterator[Broken]]) -> Invariant:
    """The invariant that a function checks, in the words of its docstring."""
    sentence = " ".join(inspect.cleandoc(function.__doc__ or "").split())
    return Invariant(function.__name__, sentence, function)


def arguments_of(argument: Any) -> Iterator[fx.Node]:
    """The nodes among the arguments of a call, in order, lists flattened."""
    if isinstance(argument, fx.Node):
        yield argument
    elif isinstance(argument, dict):
        for item in argument.values():  # pyright: ignore[reportUnknownVariableType]
            yield from arguments_of(item)
    elif isinstance(argument, (list, tuple)):
        for item in argument:  # pyright: ignore[reportUnknownVariableType]
            yield from arguments_of(item)


def of_another_stage(checked: Checked, kind: type) -> Iterator[Broken]:
    """The nodes but the output whose facts are not of a kind."""
    for node in checked.nodes:
        facts = node.meta.get(FACTS)
        if node.op != "output" and not isinstance(facts, kind):
            has = "no facts" if facts is None else f"facts of another stage, {type(facts).__name__}"
            yield Broken(node, f"has {has}")


def quoted(nodes: Iterable[fx.Node]) -> str:
    """`%a, %b`."""
    return ", ".join(f"%{node.name}" for node in nodes)
