"""The strategy of one operator as text: its splits, its variant, and the variants that could run instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from shardc.errors import InfeasibleError
from shardc.explain.explanations import Instead, Way
from shardc.ir.facts import Key
from shardc.planning.cost_network import CostNetwork
from shardc.planning.solved import Solved
from shardc.planning.strategies import OperatorOptions
from shardc.rules.factors.factored import Op
from shardc.rules.factors.rings import circle_of
from shardc.rules.factors.strategy import PLAIN, Strategy, shape_of, variants_of

Kind = tuple[str, tuple[str, ...]]
"""A variant, and the parted factors that are split."""


def result_of(op: Op, key: Key) -> int:
    """The position of a value among the results of its operator, among which unread ones are not."""
    return next(position for position, result in enumerate(op.results) if result.key == key)


def splits_text(op: Op, strategy: Strategy) -> str:
    """`dp splits n, tp splits k`, with the variant where the operator has several; "" for placeholders."""
    if op.node.op == "placeholder":
        return ""
    circle = circle_of(shape_of(op), strategy) if strategy.variant else None
    if circle is not None:
        names = op.factors[circle.inside].name, op.factors[circle.around].name
        rest = tuple(tuple([axis for axis in axes if axis != circle.axis]) for axes in strategy.split)
        others = splits_text(op, strategy._replace(split=rest, variant=PLAIN)) if any(rest) else ""
        return f"{circle.axis} splits {' and '.join(names)} together ({strategy.variant})" + f", {others}" * bool(
            others
        )
    variant = f" ({strategy.variant})" if len(op.rule.variants) > 1 else ""
    texts: list[str] = []
    for names, axes, parted in _splits(op, strategy):
        together = " together" if len(names) > 1 else ""
        texts.append(f"{','.join(axes)} splits {' and '.join(names)}{together}{variant if parted else ''}")
    texts += [f"sums over {axis} pass through" for axis, _ in strategy.passes]
    return ", ".join(texts) or "every rank makes all of it"


def _splits(op: Op, strategy: Strategy) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], bool]]:
    """The factors that are split, alone or together, the axes that do, and whether these factors are parted."""
    groups = () if strategy.variant == PLAIN else op.rule.variant(strategy.variant).together
    seen = set[str]()
    for factor, axes in zip(op.factors, strategy.split, strict=True):
        if axes and factor.name not in seen:
            names = next((group for group in groups if factor.name in group), (factor.name,))
            seen.update(names if len(names) > 1 else ())
            yield names, axes, factor.parting is not None


def ways_to_run(options: OperatorOptions, strategy: Strategy) -> tuple[Way, ...]:
    """The variant that runs, then the others that could run the operator with the same splits; empty without others."""
    if strategy.variant in options.shape.rings:
        return ()  # one that splits the same factors needs other layouts
    others = [name for name in variants_of(options.shape, strategy.split) if name != strategy.variant]
    names = [strategy.variant, *others] if others else []
    return tuple(Way(name, options.sending(strategy._replace(variant=name))) for name in names)


def instead(network: CostNetwork, op: Op, strategy: Strategy, solved: Callable[[], Solved]) -> tuple[Instead, ...]:
    """What the best plan costs in which an operator runs another variant, or splits other parted factors; empty but for
    operators with variants that split factors together, whose variants have splits of their own."""
    variable, rings = network.variable_of(op.node), network.options_of(op).rings
    if not any(variant.together for variant in op.rule.variants) and not rings:
        return ()
    kinds = [_kind(op, other) for other in network.variables[variable].domain if isinstance(other, Strategy)]
    found: list[Instead] = []
    for kind in [kind for kind in dict.fromkeys(kinds) if kind != _kind(op, strategy)]:
        problem = network.problem()
        keep = np.array([one == kind for one in kinds])
        problem.unary[variable] = np.where(keep, problem.unary[variable], np.inf)
        try:
            other = solved().again(problem)
        except (InfeasibleError, TimeoutError):
            continue
        chosen = network.assignment(other.choice).strategies[op.node]
        found.append(Instead(splits_text(op, chosen), other.cost - solved().solution.cost))
    return tuple(sorted(found, key=lambda one: one.extra))


def _kind(op: Op, strategy: Strategy) -> Kind:
    pairs = zip(op.factors, strategy.split, strict=True)
    return strategy.variant, tuple(factor.name for factor, axes in pairs if axes and factor.parting is not None)
