"""Variables of the cost network, and what their values mean.

mm on tp=2    0: nothing is split    1: tp splits m    2: tp splits n    3: tp splits k
seconds       4e-6                   2e-6              2e-6              2e-6
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardc.ir.splits import Splits
from shardc.rules.factors.factored import Key, Value
from shardc.rules.factors.strategy import Strategy


@dataclass
class Domain:
    """The values of an operator's variable: strategies, and their seconds. `operands` and `results` hold, per operand
    or result, the layout that each strategy demands or makes, by its index in the tensor class."""

    strategies: list[Strategy]
    seconds: np.ndarray
    operands: list[np.ndarray]
    results: list[np.ndarray]


@dataclass
class Variable:
    """One variable: `domain` says what its values mean, a `Strategy` (operators) or `Splits` (shares, outputs)."""

    name: str
    domain: list[Strategy] | list[Splits]
    unary: np.ndarray


def name_of(key: Key) -> str:
    """A name for a base value, unique in the program."""
    return f"{key[0].name}.{key[1]}" if key[1] else key[0].name


def base_demand(value: Value, axes: tuple[tuple[str, ...], ...]) -> Splits:
    """The layout of a base value when the leaves of its view `value` are split by `axes`."""
    base_axes: list[tuple[str, ...]] = [() for _ in value.form.base]
    for place, leaf_axes in zip(value.form.places, axes, strict=True):
        if place is not None:
            base_axes[place] = leaf_axes
    return Splits(tuple(base_axes))
