"""Reuse: the strategies of a plan, for the same program at other sizes.

planned at batch=8    %h = mm(%x, %w)    f32[8, 64]    ->   f32[8@dp, 64@tp]     strategy: dp splits m, tp splits n
reused at batch=6     %h = mm(%x, %w)    f32[6, 64]    ->   f32[6@dp, 64@tp]
"""

from __future__ import annotations

from torch import fx

from shardc.ir.splits import Splits
from shardc.planning.cost_network import Assignment, CostNetwork
from shardc.rules.factors.factored import Factored, Key, Op
from shardc.rules.factors.strategy import legal


def reuse_strategies(network: CostNetwork, old: Factored, known: Assignment) -> Assignment | None:
    """The assignment `known` of the program `old`, for the program of `network`. None where the two programs differ in
    more than sizes, or where a size is too small for its strategy."""
    new = network.factored
    if len(old.ops) != len(new.ops):
        return None
    reused = Assignment({}, {}, {}, {})
    for before, after in zip(old.ops, new.ops, strict=True):
        strategy, shape = known.strategies[before.node], network.options_of(after).shape
        if not _alike(before, after) or not legal(shape, strategy, network.mesh):
            return None
        reused.strategies[after.node], reused.shapes[after.node] = strategy, shape
    keys: dict[tuple[str, int], Key] = {(node.name, index): (node, index) for node, index in new.base}
    for old_layouts, new_layouts in (
        (known.shares, reused.shares),
        (known.kept, reused.kept),
        (known.regathered, reused.regathered),
    ):
        for (node, index), splits in old_layouts.items():
            key = keys.get((node.name, index))
            if key is None or not _fits(network, key, splits):
                return None
            new_layouts[key] = splits
    if known.forward is not None:
        names = {node.name for node in known.forward}
        reused.forward = frozenset(node for node in new.program.graph.nodes if node.name in names)
    for position, splits in known.outputs.items():
        node: fx.Node | None = new.program.results[position]
        if node is None or not _fits(network, new.values[node].key, splits):
            return None
        reused.outputs[position] = splits
    return reused


def _alike(one: Op, other: Op) -> bool:
    """Whether two operators differ in sizes at most."""
    factors = [[(f.name, f.index, f.whole) for f in op.factors] for op in (one, other)]
    rules = [(op.rule.operands, op.rule.results, op.rule.linear, op.rule.reads) for op in (one, other)]
    return one.node.name == other.node.name and factors[0] == factors[1] and rules[0] == rules[1]


def _fits(network: CostNetwork, key: Key, splits: Splits) -> bool:
    sizes = network.factored.sizes(key)
    return len(sizes) == len(splits.axes) and all(map(network.mesh.splits, sizes, splits.axes))
