"""The captured program: a flat ATen graph whose every value knows its shape, role, module path and source line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils._pytree import TreeSpec

from shardc.ir.facts import Key, captured, origin_of
from shardc.ir.versions import GraphVersion
from shardc.runtime.kernels.random import DRAWS


class Role(StrEnum):
    """What a graph input or output is to the user."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    INPUT = "input"
    NUMBER = "number"
    """An int among the inputs, while sizes are symbols: the size of a tensor that stands for it."""
    TANGENT = "tangent"
    OUTPUT = "output"
    MUTATION = "mutation"
    GRADIENT = "gradient"


@dataclass(frozen=True)
class Port:
    """One graph input or output.

    `name` is the parameter's or buffer's path (for a gradient: of what it is the gradient), `input:<index>` for an
    input; `index` is the position among the flat inputs (INPUT) or the flat outputs (OUTPUT, TANGENT), else 0.
    """

    role: Role
    name: str
    index: int = 0


class Made(Protocol):
    """An output of the user's program that is made anew at every run, of results, inputs and what exists."""

    def make(self, run: Any) -> Any: ...


class CallEffects(Protocol):
    """What a call of the user's program does beside computing its results."""

    @property
    def returned(self) -> Made | None:
        """What the user's program returns; None where that is merely made of its flat outputs."""
        ...

    def broken(self, arguments: Any) -> str:
        """Why a call with these arguments is not one of this program: which value that the code read has changed; ""
        if it is."""
        ...

    def changes(self) -> frozenset[tuple[int, Any]]:
        """What `broken` has found changed until now, each as the identity of a container and a key in it."""
        ...

    @property
    def version(self) -> int:
        """Another number whenever a tensor that `broken` has looked at may be another, or of another kind."""
        ...

    def knows(self, container: Any, key: Any) -> bool:
        """Whether `broken` looks at the tensor that stands under a key of a container."""
        ...

    def at(self, number: Callable[[Any], Any]) -> CallEffects:
        """The same, with `number` to put the sizes of a call into symbolic numbers."""
        ...

    def as_captured(self) -> AbstractContextManager[None]:
        """In here, all that the code reads is as it was when the program was captured."""
        ...

    def before(self) -> dict[int, Any]:
        """What a run needs to know that is found before it."""
        ...

    def run(self, results: Sequence[Any], inputs: Sequence[Any], arguments: Any, before: dict[int, Any]) -> Any:
        """What `Made.make` needs to know of a run."""
        ...

    def replay(self, run: Any) -> None:
        """Leave behind what the user's program leaves behind."""
        ...


class Stands(Protocol):
    """A place where a tensor stands."""

    @property
    def container(self) -> Any:
        """What holds it."""
        ...

    @property
    def key(self) -> Any:
        """Where it is there."""
        ...

    def get(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Microbatches:
    """How the program of one micro-batch makes up that of the batch: it runs `count` times.

    `dims` has, per input, tangent or output of which each run takes or makes a part, the dim that is parted. Outputs
    that are addends are in `sums`; all others are the same in every run. `prologue` computes constants of the program
    from all of the batch, once: its results are those called `prologue:0`, `prologue:1`, ...
    """

    count: int
    dims: Mapping[Port, int]
    sums: frozenset[Port]
    prologue: Program | None = None

    def part(self, port: Port) -> tuple[int, int] | None:
        """The dim of which a run has a part, and how many parts there are; None where it has all."""
        return (self.dims[port], self.count) if port in self.dims else None


@dataclass
class Program:
    """A captured model: a version of its graph, one port per placeholder and per element of the output tuple.

    `out_leaves` holds the flat outputs of the user's program: the position in `outputs` of a tensor, the constant
    itself wrapped in `Constant`, or how it is made. After them come the tensors that the program leaves behind:
    `effects` says where. `constants` are tensors that the program holds; those that stand `standing` in a place are
    looked up there at every run. `tied` maps every alias of a parameter to the name that the graph uses.
    `attached` are the positions of the outputs that require a gradient on one device. `orders` are the dims of results
    from major to minor, where they do not lie contiguous in one device's memory. `depends_on` are the outputs on whose
    gradients a gradient depends: without any of these it is None on one device. A gradient that is not there always is.
    `deferred` are the parameters whose gradients backward leaves as addends, for an epilogue to reduce their sums. With
    `microbatches`, this is the program of one of them.
    """

    version: GraphVersion
    inputs: list[Port]
    outputs: list[Port]
    out_spec: TreeSpec
    out_leaves: list[int | Constant | Made]
    constants: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    tied: dict[str, str] = field(default_factory=dict[str, str])
    attached: frozenset[int] = frozenset()
    standing: Mapping[str, Stands] = field(default_factory=dict[str, Stands])
    effects: CallEffects | None = None
    orders: Mapping[Port, tuple[int, ...]] = field(default_factory=dict[Port, tuple[int, ...]])
    depends_on: Mapping[Port, tuple[int, ...]] = field(default_factory=dict[Port, tuple[int, ...]])
    deferred: frozenset[str] = frozenset()
    microbatches: Microbatches | None = None

    @property
    def graph(self) -> fx.Graph:
        """The graph of this version, to look at; see `GraphVersion.take` for passes that write in place."""
        return self.version.read()

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def trained(self) -> frozenset[str]:
        """The names of the parameters of which backward makes gradients."""
        parameters = {port.name for port in self.inputs if port.role is Role.PARAMETER}
        return frozenset(port.name for port in self.outputs if port.role is Role.GRADIENT) & parameters

    @property
    def turns(self) -> int:
        """How often the program runs in a step: once for every micro-batch."""
        return 1 if self.microbatches is None else self.microbatches.count

    def adds_up(self, port: Port) -> bool:
        """Whether the gradient of a port is added up over several backwards, outside of the program."""
        divided = self.microbatches is not None and port in self.microbatches.sums
        return port.role is Role.GRADIENT and (port.name in self.deferred or divided)

    @property
    def results(self) -> list[fx.Node | None]:
        """The values of the output tuple; None where a gradient is not needed."""
        return list(self.graph.output_node().args[0])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Constant:
    """A leaf of the user's output that is no tensor (or a tensor that does not depend on the inputs)."""

    value: Any


def output_names(spec: TreeSpec) -> list[str]:
    """The names of flat outputs in the user's structure: `logits`, `past_key_values.key_cache.0`; `output:1` where it
    names nothing."""

    def paths(spec: TreeSpec, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        children, context = spec.children(), spec.context
        if spec.is_leaf():
            yield path
        keys = getattr(context, "_fields", context)  # those of a named tuple
        named = isinstance(keys, (list, tuple)) and len(keys) == len(children) and all(isinstance(k, str) for k in keys)
        for index, child in enumerate(children):
            yield from paths(child, (*path, str(keys[index] if named else index)))

    found = [".".join(path) for path in paths(spec, ())]
    return [f"output:{name or 0}" if name[:1].isdigit() or not name else name for name in found]


def value_of(node: fx.Node) -> Any:
    """The fake value (global shape and dtype) that capture recorded for `node`."""
    return captured(node).value


def tensor_of(key: Key) -> torch.Tensor:
    """The fake tensor of a value that is one tensor."""
    value = value_of(key[0])
    return value[key[1]] if isinstance(value, (tuple, list)) else value


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
    """A call, named after its operator, where `graph` is being written.

    `Graph.create_node` searches all arguments for symbolic sizes, only to warn, and that takes as long as all else that
    it does: so it is given none. They are set as it would set them; the setter of `args` is for nodes that stand in
    tables already.
    """
    node = graph.create_node("call_function", target, (), {}, name_of(target).strip("_"))
    node._update_args_kwargs(args, kwargs or {})
    return node


@cache
def name_of(target: Any) -> str:
    """The name of an operator without its namespace and overload, or of a function."""
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else target.__name__


_PLAIN = frozenset({int, float, bool, str, type(None)})


def frozen(argument: Any) -> Any:
    """The argument of a call as a key; what is equal may have another key if it is not the same object. Fake values
    count by identity: the nodes of equal layers share theirs."""
    if type(argument) in _PLAIN:
        return type(argument), argument
    if isinstance(argument, fx.Node):
        return id(value_of(argument))
    if isinstance(argument, (list, tuple)):
        return tuple([frozen(item) for item in argument])
    if isinstance(argument, dict):
        return tuple([(key, frozen(item)) for key, item in argument.items()])
    if isinstance(argument, slice):
        return slice, frozen(argument.start), frozen(argument.stop), frozen(argument.step)
    return type(argument), argument


def ancestors(nodes: Iterable[fx.Node], beyond: Collection[fx.Node] = frozenset()) -> set[fx.Node]:
    """The nodes themselves and all that they are computed from, as far as it is not among or before `beyond`."""
    needed: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in needed and node not in beyond:
            needed.add(node)
            stack += node.all_input_nodes
    return needed


def forward_part(
    graph: fx.Graph, ports: Sequence[Port], results: Sequence[fx.Node | None], more: Iterable[fx.Node] = ()
) -> set[fx.Node]:
    """What runs in forward: all that its results need (those that are no gradients, and `more`), and all draws, which
    are made in the order of the single device. `results` has a node or None for every port."""
    wanted = [n for port, n in zip(ports, results, strict=True) if n is not None and port.role is not Role.GRADIENT]
    return ancestors([*wanted, *more, *(node for node in graph.nodes if node.target in DRAWS)])


def where(node: fx.Node) -> str:
    """`layers.0.mlp, model.py:41`: where in the user's code a value comes from, for messages and printouts."""
    place = origin_of(node)
    return f"{place.module}, {place.source}" if place.module and place.source else place.module or place.source


def depended_on(program: Program) -> frozenset[int]:
    """The positions of outputs from which other outputs that require a gradient are computed."""
    ends = {i: value for i, (port, value) in enumerate(zip(program.outputs, program.results, strict=True))
            if port.role is Role.OUTPUT and value is not None}  # fmt: skip
    if len(program.attached) < 2:
        return frozenset()
    reached: dict[fx.Node, int] = {}
    """For every value a bit for each output that is computed from it."""
    for index in program.attached & ends.keys():
        reached[ends[index]] = reached.get(ends[index], 0) | 1 << index
    own = dict(reached)
    for node in reversed(program.graph.nodes):
        for operand in node.all_input_nodes if reached.get(node) and node.op != "output" else ():
            reached[operand] = reached.get(operand, 0) | reached[node]
    return frozenset(i for i in program.attached & ends.keys() if reached[ends[i]] != own[ends[i]])
