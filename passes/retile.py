"""Retile: a border where the user stores a parameter across the pieces in which the model uses it.

A key projection of 2 heads x 16 that is to be stored in 4 parts cuts through the heads. The border keeps the two sides'
atoms apart: on its dims the parameter is gathered before use, and its gradient is scattered after it, as FSDP does.

    %w = parameter   f32[32@dp, 64]            ->   %w = parameter    f32[32@dp, 64]
    %h = mm(%x, permute(%w))                        %u = retile(%w)   f32[(2 16), 64]
                                                    %h = mm(%x, permute(%u))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from shardc.ir.facts import Captured, describe, origin_of
from shardc.ir.mesh import Mesh
from shardc.ir.program import Port, Program, Role, call, value_of
from shardc.ir.versions import GraphVersion, copied
from shardc.passes.factor import factor
from shardc.planning.compilation import Compilation, compiler_pass
from shardc.planning.constraints import ParameterDemand
from shardc.planning.gradient_sums import takes_sums
from shardc.rules.factors.factored import Factored


@compiler_pass
def retile(c: Compilation) -> Compilation:
    """Put borders into a copy of the program where constraints need them, and factor that."""
    crossing = _crossing(c.factored, c.mesh, c.demands)
    if not crossing:
        return c
    # the program that was factored is not taken: other meshes may start from it
    program = replace(c.program, version=GraphVersion.of(copied(c.program.graph)))
    nodes = dict(zip(program.inputs, program.placeholders, strict=True))
    for port, dims in crossing.items():
        _insert(program.graph, nodes[port], dims)
        _insert_on_gradient(program, port, dims)
    return factor.run(replace(c, program=program))


def _crossing(factored: Factored, mesh: Mesh, demands: Sequence[ParameterDemand]) -> dict[Port, list[int]]:
    """Per parameter the dims that a demand cuts across the pieces in which the model uses them."""
    nodes = dict(zip(factored.program.inputs, factored.program.placeholders, strict=True))
    crossing: dict[Port, list[int]] = {}
    for port, dims, _, _ in demands:
        node = nodes[port]
        if len(dims) != len(factored.values[node].dims):
            continue  # told to the user when the constraint is checked
        across = [i for i, axes in enumerate(dims) if axes and _crosses(factored, mesh, node, i, axes)]
        if across:
            crossing[port] = across
    return crossing


def _crosses(factored: Factored, mesh: Mesh, node: fx.Node, dim: int, axes: tuple[str, ...]) -> bool:
    """Whether an even split of a dim over `axes` is no split of its atoms."""
    if any(axis not in mesh.names for axis in axes) or not mesh.splits(int(value_of(node).shape[dim]), axes):
        return False  # told to the user when the constraint is checked
    sizes = [factored.atoms.size(ref) for ref in factored.atoms.leaves(factored.values[node].dims[dim])]
    if value_of(node).shape[dim] % mesh.ways(axes):
        return len(sizes) > 1
    atom, taken = 0, 1
    for axis in axes:
        while atom < len(sizes) - 1 and sizes[atom] == taken:
            atom, taken = atom + 1, 1
        taken *= mesh.sizes[axis]
        if sizes and sizes[atom] % taken:
            return True
    return False


def _border(graph: fx.Graph, node: fx.Node, dims: list[int]) -> fx.Node:
    border = call(graph, torch.ops.shardc.retile.default, (node, dims))
    describe(border, Captured(value_of(node), origin_of(node)))
    return border


def _insert(graph: fx.Graph, parameter: fx.Node, dims: list[int]) -> None:
    """Put a border between a parameter, or the one cast of it, and what reads it."""
    users = list(parameter.users)
    behind = next(node for node in graph.nodes if node.op != "placeholder")
    if len(users) == 1 and users[0].target is torch.ops.aten._to_copy.default:
        parameter, users, behind = users[0], list(users[0].users), users[0].next
    with graph.inserting_before(behind):
        border = _border(graph, parameter, dims)
    for user in users:
        user.replace_input_with(parameter, border)


def _insert_on_gradient(program: Program, port: Port, dims: list[int]) -> None:
    output = program.graph.output_node()
    results = list(program.results)
    for index, made in enumerate(program.outputs):
        gradient = results[index]
        if made.role is Role.GRADIENT and made.name == port.name and gradient is not None:
            if takes_sums(gradient):  # what is scattered is what is summed
                summed: fx.Node = gradient.args[0]  # type: ignore[assignment]
                with program.graph.inserting_before(gradient):
                    gradient.replace_input_with(summed, _border(program.graph, summed, dims))
                continue
            with program.graph.inserting_before(output):
                results[index] = _border(program.graph, gradient, dims)
    output.args = (tuple(results),)
