"""Precision: casts stand where values enter and leave a program that was traced in other types than its tensors have.

The model is traced with parameters and inputs of the types in which it computes. So all between has these types.

    %up_weight = input              bf16[256, 64]     ->   %up_weight = input                             f32[256, 64]
    %t = permute(%up_weight)        bf16[64, 256]          %c = _to_copy(%up_weight, dtype=bfloat16)      bf16[256, 64]
    ...                                                    %t = permute(%c)                               bf16[64, 256]
    return [..., %mm_4]             bf16[256, 64]          ...
                                                           %g = gradient_cast(%mm_4, float32, False)      f32[256, 64]
                                                           return [..., %g]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_unflatten

from shardc.capture.inputs import flatten
from shardc.errors import CaptureError
from shardc.ir.facts import Captured, Origin, describe, origin, origin_of
from shardc.ir.precision import GRADIENT_CAST, Precision
from shardc.ir.program import Port, Program, Role, call, value_of

_CAST = torch.ops.aten._to_copy.default
_VIEWS = (torch.ops.aten.permute.default, torch.ops.aten.view.default)


_PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")}
"""Products, which refuse operands of more than one type when they run, and not when they are traced."""

_OF_ONE_TYPE = _PRODUCTS | {
    getattr(torch.ops.aten, name).default
    for name in (
        "convolution", "native_layer_norm", "index_put", "_cdist_forward", "grid_sampler_2d", "grid_sampler_3d",
        "linalg_solve_triangular",
    )
}  # fmt: skip
"""Operators that refuse operands of more than one floating type in the same way."""


def refuse_mixed_types(program: Program, precision: Precision) -> None:
    """Raise CaptureError where an operator gets operands of types that it refuses: one device would, too."""
    for node in program.graph.nodes:
        if node.target in _OF_ONE_TYPE:
            given = [value_of(one) for one in node.all_input_nodes]
            all_count = node.target in _PRODUCTS
            found = {
                one.dtype: None for one in given if isinstance(one, Tensor) and (all_count or one.is_floating_point())
            }
            wide = node.target is not torch.ops.aten.native_layer_norm.default or value_of(node.args[0]).itemsize > 2
            if len(found) > 1 and wide:  # of 16 bits, a layer norm takes weights in float32
                place, types = origin_of(node), " and ".join(map(_short, found))
                uncast = precision.parameters is not None and not precision.inputs
                rest = "leave out cast_forward_inputs=False, or cast inputs" if uncast else "cast one"
                raise CaptureError(
                    f"{f'module {place.module!r}' if place.module else 'the model'}, {place.source}: an operator gets "
                    f"{types}, and takes one type ({node.target.overloadpacket.__name__}), on one device as well; "
                    f"{rest} with .to(...), or call the model under torch.autocast"
                )


def retyped(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of another type that looks like this one, and holds no memory; the tensor itself where it has the
    type."""
    if tensor.dtype == dtype:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="meta")


def cast_outputs(output: Any, dtype: torch.dtype | None) -> Any:
    """What a model returns, with its floating tensors in this type; as it is without one."""
    leaves, spec = flatten(output)
    floating = [isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves]
    if dtype is None or not any(floating):
        return output
    return tree_unflatten(
        [leaf.to(dtype) if is_one else leaf for leaf, is_one in zip(leaves, floating, strict=True)], spec
    )


def with_casts(program: Program, precision: Precision, tensors: Mapping[str, Tensor]) -> Program:
    """The program with inputs and gradients in the types of the user's `tensors`, by name; written in place. Raises
    CaptureError where forward writes to a tensor of which it has a cast copy."""
    cast: set[str] = set()
    places = {node: place for place, node in enumerate(program.graph.nodes)}
    for port, node in zip(program.inputs, program.placeholders, strict=True):
        tensor = tensors.get(port.name) if port.role in (Role.PARAMETER, Role.INPUT) else None
        if tensor is not None and tensor.dtype != value_of(node).dtype:
            cast.add(port.name)
            _cast_entry(program.graph, port, node, tensor.dtype, places)
    written = next((p.name for p in program.outputs if p.role is Role.MUTATION and p.name in cast), None)
    if written is not None:
        rest = "cast_forward_inputs=False leaves inputs as they are" if written.startswith("input:") else (
            "write to parameters outside of the model, or leave param_dtype out"
        )  # fmt: skip
        raise CaptureError(
            f"forward writes to {written}, of which it has a copy in {_short(precision.parameters)}: the write would "
            f"be lost; {rest}"
        )
    _cast_gradients(program, precision, tensors)
    return program


def _cast_entry(graph: fx.Graph, port: Port, node: fx.Node, dtype: torch.dtype, places: Mapping[fx.Node, int]) -> None:
    """Give a placeholder its own type; what reads it reads a cast, which stands before the first reader."""
    value, users = value_of(node), list(node.users)
    describe(node, Captured(value.to(dtype).detach(), origin_of(node)))
    readers = [user for user in users if user.op != "output"] or users
    if not readers:
        return
    first = min(readers, key=places.__getitem__)
    there = origin_of(first) if first.op != "output" else Origin("", "", "forward")
    owner = port.name.rpartition(".")[0] if port.role is Role.PARAMETER else there.module
    with graph.inserting_before(first):
        made = _call(graph, _CAST, (node,), {"dtype": value.dtype}, value, origin(owner, there.source, there.phase))
    for user in users:
        user.replace_input_with(node, made)


def _cast_gradients(program: Program, precision: Precision, tensors: Mapping[str, Tensor]) -> None:
    output, results = program.graph.output_node(), list(program.results)
    parameters = {port.name for port in program.inputs if port.role is Role.PARAMETER}
    for index, port in enumerate(program.outputs):
        gradient = results[index]
        if port.role is Role.GRADIENT and gradient is not None:
            dtype, sums = tensors[port.name].dtype, precision.sums
            summed = sums if port.name in parameters and dtype.is_floating_point else None
            results[index] = _cast_gradient(program.graph, gradient, dtype, summed)
    old, output.args = program.results, (tuple(results),)
    for gradient in old:
        while gradient is not None and gradient.target is _CAST and not gradient.users:  # another cast is in its place
            operand: Any = gradient.args[0]
            program.graph.erase_node(gradient)
            gradient = operand


def _cast_gradient(graph: fx.Graph, gradient: fx.Node, dtype: torch.dtype, sums: torch.dtype | None) -> fx.Node:
    """The gradient in the type of its parameter, summed in another; without `sums`, wherever that is cheapest."""
    if sums is None:
        if value_of(gradient).dtype == dtype:
            return gradient
        with graph.inserting_after(gradient):
            value = value_of(gradient).to(dtype).detach()
            return _call(graph, _CAST, (gradient,), {"dtype": dtype}, value, origin_of(gradient))
    start = _before_casts(gradient)
    kinds = [(sums, False)] if value_of(start).dtype != sums else []
    kinds += [(dtype, True)] if sums != dtype else []
    for wanted, summed in kinds:
        with graph.inserting_after(start):
            value = value_of(start).to(wanted).detach()
            start = _call(graph, GRADIENT_CAST, (start, wanted, summed), {}, value, origin_of(start))
    return start


def _before_casts(gradient: fx.Node) -> fx.Node:
    """The gradient without the model's own casts to wider types, as autocast writes them; views are of what was before
    the cast."""
    views: list[fx.Node] = []
    node = gradient
    while len(node.users) == 1 and node.target in (_CAST, *_VIEWS):
        operand: Any = node.args[0]
        before, after = value_of(operand).dtype, value_of(node).dtype
        if node.target is not _CAST:
            views.append(node)
        elif before.is_floating_point and before.itemsize < after.itemsize:
            if not views:
                gradient = operand
            else:
                views[-1].replace_input_with(node, operand)
                node.graph.erase_node(node)
            for view in views:
                describe(view, Captured(value_of(view).to(before).detach(), origin_of(view)))
        else:
            break
        node = operand
    return gradient


def _call(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any, place: Origin
) -> fx.Node:
    made = call(graph, target, args, kwargs)
    describe(made, Captured(value, place))
    return made


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
