"""The strategy of one operator as text: its splits, its variant, and the variants that could run instead."""

from __future__ import annotations

from shardc.explain.explanations import Way
from shardc.planning.strategies import OperatorOptions
from shardc.rules.factors.factored import Op
from shardc.rules.factors.strategy import Strategy, variants_of


def splits_text(op: Op, strategy: Strategy) -> str:
    """`dp splits n, tp splits k`, with the variant where the operator has several; "" for placeholders."""
    if op.node.op == "placeholder":
        return ""
    pairs = zip(op.factors, strategy.split, strict=True)
    variant = f" ({strategy.variant})" if len(op.rule.variants) > 1 else ""
    texts = [f"{','.join(axes)} splits {f.name}{variant if f.parting else ''}" for f, axes in pairs if axes]
    texts += [f"sums over {axis} pass through" for axis, _ in strategy.passes]
    return ", ".join(texts) or "every rank makes all of it"


def ways_to_run(options: OperatorOptions, strategy: Strategy) -> tuple[Way, ...]:
    """The variant that runs, then the others that could run the operator with the same splits; empty without others."""
    others = [name for name in variants_of(options.shape, strategy.split) if name != strategy.variant]
    names = [strategy.variant, *others] if others else []
    return tuple(Way(name, options.sending(strategy._replace(variant=name))) for name in names)
