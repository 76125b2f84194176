"""Time is an axis: how a batch is divided into micro-batches, found by the rules and the solver as for any other axis.

%input_0                  f32[32@time, 64]      the batch, dim 0
%mm                       f32[32@time, 16]      each micro-batch computes its rows
%sum                      f32[] +sum@time       the loss: addends
%mm_2                     f32[16, 64] +sum@time a gradient: addends

Its ranks run one after another, so they cannot send to each other: a step that sends takes very long here, and is in
the solution only if there is no other way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx

from shardc.cost.hardware import Hardware, Link
from shardc.errors import ShardcError
from shardc.ir.layout import is_sliceable
from shardc.ir.mesh import Mesh
from shardc.ir.program import Port, Program, Role, tensor_of, value_of
from shardc.ir.splits import Splits
from shardc.planning.cost_network import Accepts, CostNetwork, LayoutDemands
from shardc.planning.strategies import OperatorOptions
from shardc.rules.factors.factored import Factored, Key, Op, Value
from shardc.rules.factors.strategy import PLAIN, Strategy
from shardc.runtime.collectives.all_gather import all_gather
from shardc.runtime.collectives.all_to_all import all_to_all
from shardc.runtime.collectives.reduce_scatter import reduce_scatter
from shardc.runtime.kernels.random import DRAWS, bernoulli, bernoulli_state, draw, draw_from, fresh_seed
from shardc.runtime.mesh.mesh import TIME
from shardc.solver.problem import zeros

_FAR = Link(latency=5.0, bandwidth=1.0)
NEVER = Link(0.05, 100.0, dict.fromkeys((all_gather, all_to_all, reduce_scatter), _FAR))
"""The link between micro-batches. What is computed hardly takes as long as a step over it. Sums may be known before all
of them, the smallest for the least; nothing else may."""


ATTENTION = (torch.ops.shardc.attention.default, torch.ops.shardc.attention_backward.default)
PARTED_DRAWS = {draw: 0, bernoulli: 1, draw_from: 1}
"""The draws of which a micro-batch makes its part, and which argument is their shape."""
_DRAWN_FROM = (bernoulli_state, fresh_seed)
"""What masks of attention are drawn from."""


def time_mesh(count: int) -> Mesh:
    """The mesh of `count` micro-batches."""
    return Mesh(((TIME, count),))


def batch_of(program: Program, count: int) -> dict[Port, int]:
    """The inputs with the batch in dim 0, and its size: those with as many rows as the first tensor. Raises ShardcError
    where `count` does not divide that."""
    sizes = _rows(program)
    if not sizes:
        raise ShardcError(f"microbatches={count}: no input of the program is a tensor with dims, so there is no batch")
    first, batch = next(iter(sizes.items()))
    if batch % count:
        raise ShardcError(
            f"microbatches={count} does not divide the batch: dim 0 of {first.name} has {batch} rows; choose one of "
            f"{', '.join(str(n) for n in range(2, batch + 1) if batch % n == 0)}"
        )
    return {port: size for port, size in sizes.items() if size == batch}


def counts_worth_trying(program: Program) -> list[int]:
    """Numbers of micro-batches, the smallest first: divisors of the batch, each about twice the one before."""
    batch = next(iter(_rows(program).values()), 1)
    found = [1]
    for count in range(2, batch + 1):
        if batch % count == 0 and count >= 2 * found[-1]:
            found.append(count)
    return found


def _rows(program: Program) -> dict[Port, int]:
    """Dim 0 of every input that has dims."""
    return {
        port: int(value_of(node).shape[0])
        for port, node in zip(program.inputs, program.placeholders, strict=True)
        if port.role is Role.INPUT and value_of(node).dim()
    }


@dataclass(eq=False)
class TimeNetwork(CostNetwork):
    """The cost network of a program on the mesh of its micro-batches. Outputs and gradients stay as they come: they are
    put together when all have run."""

    @staticmethod
    def of(factored: Factored, device: Hardware, count: int) -> TimeNetwork:
        """The network for `count` micro-batches, with the batch in dim 0 of inputs. Raises ShardcError where it cannot
        be divided there."""
        program = factored.program
        batch = batch_of(program, count)
        accepts: dict[Key, Accepts] = {}
        for port, node in zip(program.inputs, program.placeholders, strict=True):
            value = factored.values[node]
            if port in batch:
                accepts[value.key] = _batch(value, port, count)
            elif port.role is not Role.TANGENT:
                accepts[value.key] = _whole
        slow = replace(device, inside=NEVER, between=NEVER, devices_per_node=count)
        network = TimeNetwork(factored, time_mesh(count), slow, LayoutDemands(accepts, 0.0))
        network.build()
        return network

    def _kept(self, op: Op, options: OperatorOptions, port: Port | None, frozen: bool) -> list[int] | None:
        """Only what runs as it is, on a micro-batch as on a batch, or draws random numbers."""
        kept = super()._kept(op, options, port, frozen)
        if port is not None:
            return kept
        every = range(len(options.strategies)) if kept is None else kept
        return [index for index in every if self._runs_as_it_is(op, options.strategies[index])]

    def _runs_as_it_is(self, op: Op, strategy: Strategy) -> bool:
        if op.node.target in ATTENTION and any(operand.node.target in _DRAWN_FROM for operand in op.operands):
            split = [factor.name for factor, axes in zip(op.factors, strategy.split, strict=True) if axes]
            return split == ["b"]  # where weights are dropped, the kernel takes this for granted
        indexed = set(op.rule.indices.values())
        split = [factor for factor, axes in zip(op.factors, strategy.split, strict=True) if axes]
        if any(factor.size % self.mesh.size or factor.name in indexed for factor in split):
            return False
        return op.node.target in PARTED_DRAWS or (
            strategy.variant == PLAIN and all(one.parting is None for one in split)
        )

    def _add_outputs(self) -> None:
        program = self.factored.program
        parameters = {port.name for port in program.inputs if port.role is Role.PARAMETER}
        for index, (port, node) in enumerate(zip(program.outputs, program.results, strict=True)):
            if node is None:
                continue
            value = self.factored.values[node]
            tensor = self.class_of(value.key)
            whole = port.role is Role.MUTATION
            addends = port.role is Role.GRADIENT and port.name in parameters
            domain = [s for s in tensor.layouts if _comes(s, value, self.mesh, whole=whole, addends=addends)]
            variable = self._variable(f"output {index}", domain, zeros(len(domain)))
            self._connect(value.key, variable, self._intern(np.array([tensor.index[s] for s in domain])))
            self._output_variable[index] = variable


def _whole(splits: Splits) -> bool:
    return not any(splits.axes) and not splits.partial


def _batch(value: Value, port: Port, count: int) -> Accepts:
    """Accepts the layout of an input whose dim 0 is divided. Raises ShardcError where the program has it in pieces too
    small."""
    pieces = [(place, size) for place, size in value.form.dims[0] if size > 1]
    place, size = pieces[0]
    if size % count:
        raise ShardcError(
            f"microbatches={count}: the program uses dim 0 of {port.name}, the batch, as "
            f"{' x '.join(str(size) for _, size in pieces)}, and {count} does not divide the first of these"
        )
    return lambda splits: splits.axes[place or 0] == (TIME,)


def _comes(splits: Splits, value: Value, mesh: Mesh, *, whole: bool, addends: bool) -> bool:
    """Whether a result may come so from every micro-batch: the same from each, as addends, or as parts of one dim."""
    if whole or _whole(splits):
        return _whole(splits)
    if splits.partial:
        return splits.partial == ((TIME, "sum"),) and tensor_of(value.key).dtype is not torch.bool
    layout = value.form.layout_on(splits.axes)
    if addends or not is_sliceable(layout, mesh):
        return False
    cuts = layout.cuts(mesh)
    return len(cuts) == 1 and cuts[0][1] == 1 and layout.shape[cuts[0][0]] % mesh.size == 0


def from_inputs_alone(program: Program) -> set[fx.Node]:
    """What a program computes of its inputs, without parameters, tangents and random numbers."""
    roles: Mapping[fx.Node, Role] = {
        node: port.role for port, node in zip(program.inputs, program.placeholders, strict=True)
    }
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            alone = roles[node] not in (Role.PARAMETER, Role.TANGENT)
        else:
            alone = node.op == "call_function" and node.target not in DRAWS
            alone = alone and all(operand in found for operand in node.all_input_nodes)
        if alone:
            found.add(node)
    return found
