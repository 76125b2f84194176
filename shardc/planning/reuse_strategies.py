"""Adopt: the strategies of a plan, for the same program at other sizes.

planned at batch=8    %h = mm(%x, %w)    f32[8, 64]    ->   f32[8@dp, 64@tp]     strategy: dp splits m, tp splits n
adopted at batch=6    %h = mm(%x, %w)    f32[6, 64]    ->   f32[6@dp, 64@tp]
"""

from __future__ import annotations

from torch import fx

from shardc.ir.splits import Splits
from shardc.planning.cost_network import Assignment, CostNetwork
from shardc.rules.factors.factored import Factored, Key, Op
from shardc.rules.factors.strategy import legal


def reuse_strategies(network: CostNetwork, old: Factored, known: Assignment) -> Assignment | None:
    """What is known for the program `old`, carried over to `network`'s program; None where the two differ in more than
    sizes, or where a size is too small for what was chosen."""
    new = network.factored
    if len(old.ops) != len(new.ops):
        return None
    found = Assignment({}, {}, {}, {})
    for before, after in zip(old.ops, new.ops, strict=True):
        strategy, shape = known.strategies[before.node], network.options_of(after).shape
        if not _alike(before, after) or not legal(shape, strategy, network.mesh):
            return None
        found.strategies[after.node], found.shapes[after.node] = strategy, shape
    keys: dict[tuple[str, int], Key] = {(node.name, index): (node, index) for node, index in new.base}
    for theirs, own in ((known.shares, found.shares), (known.kept, found.kept), (known.regathered, found.regathered)):
        for (node, index), splits in theirs.items():
            key = keys.get((node.name, index))
            if key is None or not _fits(network, key, splits):
                return None
            own[key] = splits
    if known.forward is not None:
        names = {node.name for node in known.forward}
        found.forward = frozenset(node for node in new.program.graph.nodes if node.name in names)
    for position, splits in known.outputs.items():
        node: fx.Node | None = new.program.results[position]
        if node is None or not _fits(network, new.values[node].key, splits):
            return None
        found.outputs[position] = splits
    return found


def _alike(one: Op, other: Op) -> bool:
    """Whether two operators differ in sizes at most."""
    factors = [[(f.name, f.index, f.whole) for f in op.factors] for op in (one, other)]
    rules = [(op.rule.operands, op.rule.results, op.rule.linear, op.rule.reads) for op in (one, other)]
    return one.node.name == other.node.name and factors[0] == factors[1] and rules[0] == rules[1]


def _fits(network: CostNetwork, key: Key, splits: Splits) -> bool:
    sizes = network.factored.sizes(key)
    return len(sizes) == len(splits.axes) and all(map(network.mesh.splits, sizes, splits.axes))
