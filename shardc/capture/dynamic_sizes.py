"""Dynamic sizes: dims of inputs that change from call to call, and a program captured once as it is at given sizes.

    dynamic={"input_ids": {0: "batch", 1: "seq"}}     names dims; dims of one name have one size

Capture traces with symbols in place of these sizes, and torch records what the model's code assumes of them (guards).
`Template.at` puts numbers into the captured program, and traces nothing again. Where a guard does not hold,
`Template.admits` is False, and the caller captures the program anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from shardc.capture.eager_results import with_eager_results
from shardc.capture.inputs import flatten
from shardc.capture.masks.attention_masks import with_plain_masks
from shardc.capture.torch_patches.fake_tensors import fake_mode
from shardc.capture.torch_patches.symbols import Free, Symbols, is_symbolic
from shardc.errors import CaptureError, ShardcError
from shardc.ir.facts import Captured, describe, origin_of
from shardc.ir.model_call import Dims, Dynamic, ModelCall, size_of
from shardc.ir.program import CallEffects, Constant, Made, Program, Role, value_of
from shardc.ir.versions import GraphVersion


def named_dims(dynamic: Dynamic, call: ModelCall) -> Dims:
    """The dims that `dynamic` names by argument, by the index of the flat input: {0: {0: "batch"}}. For a sharded
    function, the arguments are those of the function.

    Raises ShardcError for an argument that the call does not have or that is no tensor, and for a dim out of range.
    """
    if not dynamic:
        return {}
    forward: Callable[..., Any] = vars(call.model).get("sharded_function", call.model.forward)
    args, kwargs = call.args, call.kwargs
    arguments, positions, count = dict[str, Any](), dict[str, int](), 0
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)
    names = [name for name, p in inspect.signature(forward).parameters.items() if p.kind not in several][: len(args)]
    unnamed = [""] * (len(args) - len(names))
    for name, value in [*zip([*names, *unnamed], args, strict=True), *kwargs.items()]:
        if name:
            arguments[name], positions[name] = value, count
        count += len(flatten(value)[0])
    dims_of_input: dict[int, dict[int, str]] = {}
    for name, dims in dynamic.items():
        tensor = arguments.get(name)
        if name not in arguments:
            raise ShardcError(f"dynamic[{name!r}]: the call has no argument {name!r}; it has {', '.join(arguments)}")
        if not isinstance(tensor, Tensor):
            raise ShardcError(
                f"dynamic[{name!r}]: the argument is a {type(tensor).__name__}, not a tensor; name one that is"
            )
        for dim in dims:
            if not -tensor.ndim <= dim < tensor.ndim:
                raise ShardcError(
                    f"dynamic[{name!r}]: dim {dim} is out of range for shape {tuple(tensor.shape)}; "
                    f"give a dim from {-tensor.ndim} to {tensor.ndim - 1}"
                )
        dims_of_input[positions[name]] = {dim % tensor.ndim: called for dim, called in dims.items()}
    return dims_of_input


def sizes_of(dims: Dims, leaves: Sequence[Any]) -> dict[str, int]:
    """The size that every name has in a call. Raises ShardcError where two inputs give one name different sizes."""
    first_seen: dict[str, tuple[int, int]] = {}
    for index, named in dims.items():
        for dim, name in named.items():
            size = size_of(leaves[index], dim)
            known, first = first_seen.setdefault(name, (size, index))
            if known != size:
                raise ShardcError(
                    f"dynamic size {name!r} is {known} in input {first} but {size} in dim {dim} of input {index}; "
                    "give dims that may differ different names"
                )
    return {name: size for name, (size, _) in first_seen.items()}


class Template:
    """A program captured with symbols for its dynamic dims.

    Raises CaptureError where the model's code fixes one of these sizes.
    """

    def __init__(self, program: Program, dims: Dims) -> None:
        self.program = program
        nodes = {port.index: node for port, node in zip(program.inputs, program.placeholders, strict=True)
                 if port.role in (Role.INPUT, Role.NUMBER)}  # fmt: skip
        sizes = {name: value_of(nodes[i]).shape[dim] for i, named in dims.items() for dim, name in named.items()}
        self._symbols = Symbols(sizes)
        self._returns_sizes = any(isinstance(o, Constant) and is_symbolic(o.value) for o in program.out_leaves)
        for name, size in self._symbols.fixed.items():
            raise CaptureError(
                f"the size {name!r} is declared dynamic, but the model's code fixes it to {size} (by branching on it, "
                "or by mixing it with a fixed size); leave it out of dynamic="
            )

    def admits(self, sizes: Mapping[str, int]) -> bool:
        """Whether everything that the model's code assumes of its sizes holds at `sizes`."""
        return self._symbols.hold(sizes)

    @property
    def free(self) -> list[Free]:
        """The sizes that may be chosen; all others follow."""
        return list(self._symbols.free.values())

    def sizes_at(self, free: Mapping[str, int]) -> dict[str, int] | None:
        """All sizes, of those that may be chosen. None where the program is not for them."""
        return self._symbols.sizes_at(free)

    def sized(self, like: Program, sizes: Mapping[str, int]) -> Program:
        """The program `like`, whose graph is that of other sizes, with the numbers that it returns and leaves behind
        at these."""
        if not (self._returns_sizes or self.program.effects):
            return like
        number = self._symbols.evaluator(sizes)
        return replace(like, out_leaves=self._leaves(number), effects=self._effects(number))

    def at(self, sizes: Mapping[str, int]) -> Program:
        """The program that a capture at these sizes would give."""
        number = self._symbols.evaluator(sizes)
        mode = fake_mode()

        def concrete(value: Any) -> Any:
            if isinstance(value, Tensor):
                shape, strides = map(number, value.shape), map(number, value.stride())
                with mode:
                    return torch.empty_strided(tuple(shape), tuple(strides), dtype=value.dtype, device=value.device)
            return number(value)

        ports = zip(self.program.inputs, self.program.placeholders, strict=True)
        numbers = {node for port, node in ports if port.role is Role.NUMBER}
        inputs = [port for port in self.program.inputs if port.role is not Role.NUMBER]
        graph, new = fx.Graph(), dict[fx.Node, Any]()
        for node in self.program.graph.nodes:
            if node.op == "output":
                graph.output(fx.map_arg(node.args[0], new.__getitem__))
            elif is_symbolic(value_of(node)):
                new[node] = number(value_of(node))
            elif node in numbers:
                continue
            else:
                args, kwargs = map_aggregate(
                    (node.args, node.kwargs), lambda a: new[a] if isinstance(a, fx.Node) else number(a)
                )  # type: ignore[misc]
                new[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
                describe(new[node], Captured(pytree.tree_map(concrete, value_of(node)), origin_of(node)))
        version = GraphVersion.of(graph)
        leaves, effects = self._leaves(number), self._effects(number)
        program = replace(self.program, version=version, inputs=inputs, out_leaves=leaves, effects=effects)
        return with_eager_results(with_plain_masks(program))

    def _leaves(self, number: Callable[[Any], Any]) -> list[int | Constant | Made]:
        old = self.program.out_leaves
        return [Constant(number(leaf.value)) if isinstance(leaf, Constant) else leaf for leaf in old]

    def _effects(self, number: Callable[[Any], Any]) -> CallEffects | None:
        return self.program.effects.at(number) if self.program.effects else None
