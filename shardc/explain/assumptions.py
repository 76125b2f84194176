"""Assumptions: at which other sizes of the inputs the strategies of a plan can be reused, and where nothing is padded.

    f32[32@(dp,tp), 64]  on dp=2,tp=4    ->    even at multiples of 8, padded otherwise; not below 8

Some axes split the first atom of an input's dim, wherever that atom occurs. `reuse_strategies` needs every such split
to be legal at the new size; an operator that cannot pad needs a size that divides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from shardc.explain.explanations import Assumption
from shardc.ir.program import Role
from shardc.planning.cost_network import Assignment, CostNetwork
from shardc.rules.factors.factored import Factored
from shardc.rules.factors.strategy import Shape, split_of, splittable

Axes = tuple[str, ...]


def assumptions(network: CostNetwork, assignment: Assignment) -> tuple[Assumption, ...]:
    """One assumption for every first atom of the inputs' dims that the plan splits; tied dims have one together."""
    mesh, factored = network.mesh, network.factored
    dims = _input_dims(factored)
    splitting: dict[int, set[Axes]] = {piece: set() for piece in dims}
    strict: dict[int, set[int]] = {piece: set() for piece in dims}
    for piece, axes, where in _uses(network, assignment):
        if piece in dims and mesh.ways(axes) > 1:
            splitting[piece].add(axes)
            if where is not None and not _padded(*where, axes, network):
                strict[piece].add(mesh.ways(axes))
    assumed: list[Assumption] = []
    for piece, uses in dims.items():
        if splitting[piece]:
            ways = [mesh.ways(axes) for axes in splitting[piece]]
            _, _, size, rest = uses[0]
            names = tuple(f"{name} dim {dim}" for name, dim, _, _ in uses)
            every, least = rest * math.lcm(*ways), rest * max(ways)
            assumed.append(Assumption(names, size, every, least, rest * math.lcm(*strict[piece])))
    return tuple(assumed)


def _input_dims(factored: Factored) -> dict[int, list[tuple[str, int, int, int]]]:
    """Per atom that is the first of a dim of an input: the input, the dim, the dim's size, and that of the atoms after
    the first."""
    dims: dict[int, list[tuple[str, int, int, int]]] = {}
    program = factored.program
    for port, node in zip(program.inputs, program.placeholders, strict=True):
        if port.role is Role.INPUT and node in factored.values:
            for index, dim in enumerate(factored.values[node].dims):
                refs = factored.atoms.leaves(dim)
                if refs:
                    rest = math.prod(factored.atoms.size(ref) for ref in refs[1:])
                    size = rest * factored.atoms.size(refs[0])
                    dims.setdefault(factored.atoms.piece(refs[0]), []).append((port.name, index, size, rest))
    return dims


def _uses(network: CostNetwork, assignment: Assignment) -> Iterator[tuple[int, Axes, tuple[Shape, int] | None]]:
    """Every atom that is split, with its axes; in an operator, also the operator's shape and the factor."""
    factored = network.factored
    for op in factored.ops:
        strategy, shape = assignment.strategies[op.node], network.options_of(op).shape
        if any(strategy.split):
            for item, carried in zip(op.items, op.kind.carried, strict=True):
                split = split_of(shape, strategy, [factor for factor in carried if factor is not None])
                for ref, factor in zip(factored.leaves(item.value), carried, strict=True):
                    if factor is not None and split[factor]:
                        yield factored.atoms.piece(ref), split[factor], (shape, factor)
    program = factored.program
    outputs = {factored.values[node].key: i for i, node in enumerate(program.results) if node is not None}
    kept = {key: assignment.outputs[i] for key, i in outputs.items() if i in assignment.outputs}
    for key, splits in (*assignment.shares.items(), *kept.items()):
        for ref, axes in zip(factored.leaves(factored.base[key]), splits.axes, strict=True):
            if axes:
                yield factored.atoms.piece(ref), axes, None


def _padded(shape: Shape, factor: int, axes: Axes, network: CostNetwork) -> bool:
    """Whether the operator accepts a factor of a size that the axes do not divide."""
    uneven = 2 * network.mesh.ways(axes) + 1
    factors = tuple(replace(f, size=uneven) if i == factor else f for i, f in enumerate(shape.factors))
    return splittable(replace(shape, factors=factors), factor, axes, network.mesh)
