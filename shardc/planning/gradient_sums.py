"""In which type gradients are summed over ranks: where a `gradient_cast` stands, the cost network forbids sums on one
side of it.

%g = mm(%t, %x)                              bf16[512, 512] +sum@dp
%s = gradient_cast(%g, float32, False)       f32[512, 512] +sum@dp      %g may not become complete before it
%r = reduce_scatter(%s, dim=0, axis=dp)      f32[512@dp, 512]

%m = gradient_cast(%h, float32, True)        f32[512, 512]              %m is complete: %h was summed, in bfloat16
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import fx

from shardc.ir.precision import GRADIENT_CAST
from shardc.ir.program import Role, tensor_of
from shardc.ir.splits import Splits
from shardc.planning.strategies import OperatorOptions
from shardc.planning.variables import Variable
from shardc.rules.factors.factored import Factored, Key, Op
from shardc.rules.factors.strategy import Strategy, demand, make

_SUMS = (torch.ops.aten.add.Tensor,)
"""What joins gradients of one parameter that is used several times."""


def takes_sums(node: fx.Node) -> bool:
    """Whether a node is the cast of a gradient that was summed: conversions of its operand are those of a gradient."""
    return node.target is GRADIENT_CAST and bool(node.args[2])


def summed_bytes(factored: Factored) -> dict[torch.dtype, list[float]]:
    """The bytes of each gradient as ranks sum it, by the type in which they do."""
    sizes: dict[torch.dtype, list[float]] = {}
    for port, node in zip(factored.program.outputs, factored.program.results, strict=True):
        if node is not None and port.role is Role.GRADIENT:
            key = factored.values[node].key
            tensor = tensor_of(factored.values[key[0].args[0]].key if takes_sums(key[0]) else key)  # type: ignore[index]
            sizes.setdefault(tensor.dtype, []).append(float(tensor.nbytes))
    return sizes


def complete(factored: Factored) -> dict[Key, Callable[[Splits], bool]]:
    """The layouts that gradients may have whose addends were summed before they were cast."""
    return {(op.node, 0): _is_complete for op in factored.ops if takes_sums(op.node)}


def _is_complete(splits: Splits) -> bool:
    return not splits.partial


def late_sums(
    factored: Factored,
    variable_of: Mapping[fx.Node, int],
    variables: Sequence[Variable],
    options_of: Callable[[Op], OperatorOptions],
) -> Iterator[tuple[int, int, np.ndarray]]:
    """An edge between every two operators that hand on a gradient which is summed later: infinite where it would be
    summed in between, and zero elsewhere. Equal layers share their tables."""
    known: dict[tuple[int, int, int, int], np.ndarray] = {}
    for maker, result, reader, operand in _handed_on(factored):
        places = variable_of[maker.node], variable_of[reader.node]
        made, read = (variables[place].domain for place in places)
        key = id(made), id(read), result, operand
        if key not in known:
            mesh, shapes = options_of(maker).mesh, (options_of(maker).shape, options_of(reader).shape)
            before = [make(shapes[0], one, result, mesh) for one in made if isinstance(one, Strategy)]
            after = [demand(shapes[1], one, operand, mesh) for one in read if isinstance(one, Strategy)]
            known[key] = np.array([[0.0 if _is_kept(one, other) else np.inf for other in after] for one in before])
        if np.isfinite(known[key]).any(axis=0).all() and np.isfinite(known[key]).any(axis=1).all():
            yield *places, known[key]


def _is_kept(before: Splits, after: Splits) -> bool:
    return set(before.partial) <= set(after.partial)


def _handed_on(factored: Factored) -> Iterator[tuple[Op, int, Op, int]]:
    """What makes a gradient that is summed later, and which of its results that is; what reads it, as which operand."""
    makers = {result.key: (op, index) for op in factored.ops for index, result in enumerate(op.results)}
    by_node = {op.node: op for op in factored.ops}
    readers = Counter(operand.value.key for op in factored.ops for operand in op.operands)
    readers.update(factored.values[node].key for node in factored.program.results if node is not None)
    stack = [op for op in factored.ops if op.node.target is GRADIENT_CAST and not op.node.args[2]]
    while stack:
        reader = stack.pop()
        for index, operand in enumerate(reader.operands):
            key = operand.value.key
            if readers[key] == 1:  # what others read too is no longer this gradient alone
                maker, result = makers[key]
                yield maker, result, reader, index
                if maker.node.target in _SUMS:
                    stack.append(by_node[maker.node])
