"""What one device's results are beyond their values: how they lie in memory, and when there is no gradient.

return a(h), b(h)     # the gradient of b.weight depends on that of output 1: without this it is None
return h.mT           # order (1, 0): dim 1 is the major one in memory
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, fx

from shardc.ir.program import Port, Program, Role, value_of


def with_eager_results(program: Program) -> Program:
    """The program with its `orders` and `depends_on`; its sizes must be numbers."""
    results = dict(zip(program.outputs, program.results, strict=True))
    orders = {port: memory_order(value_of(node)) for port, node in results.items() if node is not None}
    return replace(
        program, orders={port: order for port, order in orders.items() if order}, depends_on=_dependence(program)
    )


def memory_order(value: Tensor) -> tuple[int, ...]:
    """The dims of a tensor from major to minor; empty where it is contiguous, or where elements share memory."""
    sizes, strides = value.shape, value.stride()
    if value.is_contiguous() or any(stride == 0 and n > 1 for n, stride in zip(sizes, strides, strict=True)):
        return ()
    order = tuple(sorted(range(value.ndim), key=strides.__getitem__, reverse=True))
    return () if order == tuple(range(value.ndim)) else order


def _dependence(program: Program) -> dict[Port, tuple[int, ...]]:
    """Per gradient the outputs on whose gradients it depends, if these are some and not all.

    Autograd makes no gradient where none comes in. One that depends on no other is zeros, whatever comes in.
    """
    ports = dict(zip(program.placeholders, program.inputs, strict=True))
    tangents = {port.index for port in program.inputs if port.role is Role.TANGENT}
    if len(tangents) < 2:
        return {}
    reached: dict[fx.Node, frozenset[int]] = {}
    for node in program.graph.nodes:
        port, before = ports.get(node), {reached[operand] for operand in node.all_input_nodes}
        if port is not None and port.role is Role.TANGENT:
            reached[node] = frozenset({port.index})
        else:
            reached[node] = next(iter(before)) if len(before) == 1 else frozenset().union(*before)
    found = {
        port: tuple(sorted(reached[node]))
        for port, node in zip(program.outputs, program.results, strict=True)
        if port.role is Role.GRADIENT and node is not None
    }
    return {port: outputs for port, outputs in found.items() if 0 < len(outputs) < len(tangents)}
