"""Every row of the table of identities, on numbers that are easily got wrong: the bits are those of the operand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from shardc.ir.facts import NOWHERE, Lowered, describe
from shardc.rules.rewrites.identities import BY_OPERATOR, IDENTITIES, Identity, Shorter

aten = torch.ops.aten
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.bool)
SPECIAL = [0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan, 1e-45, 6e-8, 65504.0, 3e38, 0.1]
NUMBERS = [0, 0.0, -0.0, 1, 1.0, True, False, -1, 2, 0j, 1 + 0j]
X = "x"
CALLS: dict[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    aten.view.default: [((X, sizes), {}) for sizes in ([3, 4], [4, 3], [12], [3, 2, 2])],
    aten.permute.default: [((X, dims), {}) for dims in ([0, 1], [1, 0])],
    aten.expand.default: [((X, sizes), {}) for sizes in ([3, 4], [2, 3, 4])],
    aten.slice.Tensor: [((X, *args), {}) for args in ((), (1, 0, 4), (0, 0, 99), (0, 1), (1, 0, 4, 2))],
    aten.slice_backward.default: [((X, [3, 4], 1, 0, 4, 1), {}), ((X, [3, 8], 1, 0, 8, 2), {})],
    aten.cat.default: [(([X], 1), {}), (([X, X], 1), {})],
    aten.constant_pad_nd.default: [((X, amounts), {}) for amounts in ([0, 0], [0, 0, 0, 0], [1, 0])],
    aten.clone.default: [((X,), {}), ((X,), {"memory_format": torch.contiguous_format})],
    aten._to_copy.default: [((X,), {"dtype": dtype}) for dtype in DTYPES],
    aten.mul.Tensor: [((X, number), {}) for number in NUMBERS],
    aten.div.Tensor: [((X, number), {}) for number in NUMBERS if number],
    aten.pow.Tensor_Scalar: [((X, number), {}) for number in NUMBERS],
    aten.add.Tensor: [((X, number), {"alpha": a}) for number in NUMBERS for a in (1, -1, 2)],
    aten.sub.Tensor: [((X, number), {"alpha": a}) for number in NUMBERS for a in (1, -1, 2)],
    aten.where.self: [((True, X, X), {})],
}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def given(dtype: torch.dtype) -> tuple[fx.Node, Tensor]:
    """The operand of a call, as a node and as a tensor of twelve elements."""
    node, x = fx.Graph().placeholder("x"), torch.tensor(SPECIAL, dtype=torch.float64)
    describe(node, Lowered(NOWHERE, dtype))
    if dtype.is_complex:
        x = torch.complex(x, x.flip(0))
    elif not dtype.is_floating_point:
        x = x.nan_to_num().clamp(-9.0, 9.0)
    return node, x.to(dtype).view(3, 4)


def put(argument: Any, x: Any) -> Any:
    """The argument with `x` in its place."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(put(item, x) for item in argument)  # pyright: ignore
    return x if isinstance(argument, str) else argument


def taken(row: Identity, dtype: torch.dtype) -> int:
    """How many calls a row takes of those whose result has the operand's dtype and shape; all keep the bits."""
    count = 0
    for args, kwargs in CALLS[row.operator]:
        node, x = given(dtype)
        if row.becomes(*put(args, node), **kwargs) is not node:
            continue
        args = put(args, x)
        if row.operator is aten.where.self:
            args = (torch.tensor(args[0]), *args[1:])
        try:
            made = row.operator(*args, **kwargs)
        except RuntimeError:  # an operator that torch has not for this dtype, as subtraction of booleans
            continue
        if made.dtype is x.dtype and made.shape == x.shape:
            assert torch.equal(bits(made), bits(x)), (row, args, kwargs)
            count += 1
    return count


ROWS = [row for row in IDENTITIES if row.operator in CALLS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.operator} {row.reason}"[:60])
def test_a_row_keeps_every_bit(row: Identity) -> None:
    counts = [taken(row, dtype) for dtype in DTYPES]
    shorter = "a view of a" in row.reason or "adds or drops" in row.reason or "permutation of" in row.reason
    assert any(counts) is not shorter


def test_every_row_is_tried() -> None:
    assert {row.operator for row in IDENTITIES} == CALLS.keys() | {aten.neg.default}
    assert set(itertools.chain(*BY_OPERATOR.values())) == set(IDENTITIES)


def test_two_of_a_kind() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")

    def rewritten(*calls: tuple[Any, ...]) -> Any:
        node = x
        for target, *args in calls:
            node = graph.call_function(target, (node, *args))
        found = (row.becomes(*node.args) for row in BY_OPERATOR[node.target])
        return next((one for one in found if one is not None and one is not node.args[0]), None)

    neg, permute, view = aten.neg.default, aten.permute.default, aten.view.default
    assert rewritten((neg,), (neg,)) is x
    assert rewritten((neg,)) is None
    assert rewritten((permute, [2, 0, 1]), (permute, [1, 2, 0])) == Shorter((x, [0, 1, 2]))
    assert rewritten((permute, [2, 0, 1]), (permute, [2, 1, 0])) == Shorter((x, [1, 0, 2]))
    assert rewritten((view, [4, 3]), (view, [12])) == Shorter((x, [12]))
    assert rewritten((aten.unsqueeze.default, 0), (view, [12])) == Shorter((x, [12]))
