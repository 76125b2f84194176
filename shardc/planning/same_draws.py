"""Operators that draw from one seed: each draws anew what the others drew, so all of them are split alike.

    %seed = fresh_seed()                                    u8[8]
    %a = attention(%q, %k, %v, ..., %seed, ...)             forward drops weights
    %b = attention_backward(%grad, %q, ..., %seed, ...)     backward drops the same ones

Which numbers a rank draws from a seed depends on its parts of the factors that are parted, and on the variant: bodies
draw tile by tile. So of two such operators, the cost network forbids strategies that differ in these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import numpy as np
from torch import fx

from shardc.planning.strategies import OperatorOptions
from shardc.planning.variables import Variable
from shardc.rules.factors.factored import Factored, Op
from shardc.rules.factors.strategy import Shape, Strategy
from shardc.runtime.kernels.random import fresh_seed


def ties(
    factored: Factored,
    variable_of: Mapping[fx.Node, int],
    variables: Sequence[Variable],
    options_of: Callable[[Op], OperatorOptions],
) -> list[tuple[int, int, np.ndarray]]:
    """An edge between the variables of every two operators that draw from one seed: zero for strategies by which they
    draw the same, and infinite for others. Equal layers share their tables."""
    known: dict[tuple[int, int], np.ndarray] = {}
    edges: list[tuple[int, int, np.ndarray]] = []
    for one, other in _sharing(factored):
        places = variable_of[one.node], variable_of[other.node]
        domains = [variables[place].domain for place in places]
        key = id(domains[0]), id(domains[1])
        if key not in known:
            shapes = options_of(one).shape, options_of(other).shape
            ways = [[_drawn_by(shape, each) for each in domain] for shape, domain in zip(shapes, domains, strict=True)]
            known[key] = np.array([[0.0 if way == there else np.inf for there in ways[1]] for way in ways[0]])
        edges.append((*places, known[key]))
    return edges


def _sharing(factored: Factored) -> Iterator[tuple[Op, Op]]:
    """The pairs of operators that draw from one seed: the first of its readers with each of the others."""
    readers: dict[fx.Node, list[Op]] = defaultdict(list)
    for op in factored.ops:
        for operand in op.operands:
            if operand.value.key[0].target is fresh_seed:
                readers[operand.value.key[0]].append(op)
    for first, *others in readers.values():
        yield from ((first, other) for other in others)


def _drawn_by(shape: Shape, strategy: object) -> Hashable:
    """What decides which numbers a rank draws under a strategy."""
    assert isinstance(strategy, Strategy)
    split = {(f.name, f.index): axes for f, axes in zip(shape.factors, strategy.split, strict=True) if f.parting}
    return strategy.variant, tuple(sorted((factor, axes) for factor, axes in split.items() if axes))
