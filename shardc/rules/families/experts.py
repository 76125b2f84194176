"""Experts as one operator. Tokens split freely; experts and their inner dim are parted.

axis splits         runs                    sends
t                   the operator itself     nothing
e, or f             in parts                nothing: the results are addends
e and t             exchanged               rows, to their experts and back, priced as if routing were balanced
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardc.rules.notation import Body, RowBound, Rule, Send, Variant, Workspace, named_dims, parse, rule
from shardc.runtime.collectives.all_gather import all_gather
from shardc.runtime.collectives.all_to_all_rows import all_to_all_rows
from shardc.runtime.kernels.mixture import experts_parts
from shardc.runtime.kernels.mixture.fused import CAPACITY, backward_elements, forward_elements


def _weights(up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None) -> list[str]:
    """Rule texts of the weights that there are."""
    e, f = "e:sum~", "f:sum~"
    pairs = (up, f"{e} g! {f} d!"), (up_bias, f"{e} g! {f}"), (down, f"{e} d! {f}"), (down_bias, f"{e} d!")
    return [named_dims(x, text.split()) for x, text in pairs if x is not None]


def _told(experts: int) -> Send:
    """How many rows a rank has for each expert."""
    return Send(all_gather, (), 8, elements=experts)


def _products(up: Tensor, ids: Tensor, count: int) -> list[str]:
    """`count` products of a row with a weight [f, d]; a token has a row at k of the experts."""
    return [f"{ids.shape[1]}/{up.shape[0]} t e f d"] * count


def _variants(
    in_parts: Body, exchanged: Body, sends: Mapping[str, Sequence[Send]], memory: tuple[Workspace, ...],
    exchanging: tuple[Workspace, ...], imbalance: float,
) -> list[Variant]:  # fmt: skip
    return [
        Variant("in_parts", in_parts, workspace=memory, imbalance=imbalance),
        Variant("exchanged", exchanged, sends, (), exchanging, exchange=("e", "t"), imbalance=imbalance),
    ]


@rule(torch.ops.shardc.experts.default)
def experts(
    x: Tensor, ids: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    activation: str, slope: str, capacity: float = CAPACITY, overflow: str = "rounds", imbalance: float = 1.0,
) -> Rule:  # fmt: skip
    """Linear in the scores."""
    del activation, slope, overflow
    left = [named_dims(one, text.split()) for text, one in (("t d!", x), ("t k!", ids), ("t k!", scores))]
    k, size = ids.shape[1], x.element_size()
    rows = Send(all_to_all_rows, ("t", "d"), size, elements=k)
    sends = {"e": [_told(up.shape[0]), rows, rows]}
    bound = RowBound("t", "e", k, up.shape[0], capacity)
    work = _work(forward_elements(up.shape[1]), size, bound, 0)
    memory = *work, *_total(size, bound), *_places(k, bound, 2)
    exchanging = *work, *_travel(2, size, bound), *_places(k, bound, 2, exchanged=True)
    return parse(
        f"{', '.join([*left, *_weights(up, up_bias, down, down_bias)])} -> {left[0]}", [{2}],
        flops=_products(up, ids, up.shape[1] + 1), multiplied=[2], workspace=memory,
        variants=_variants(
            experts_parts.experts_in_parts, experts_parts.experts_exchanged, sends, memory, exchanging, imbalance
        ),
    )  # fmt: skip


@rule(torch.ops.shardc.experts_backward.default)
def experts_backward(
    grad: Tensor, x: Tensor, ids: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, slope: str, learns: bool, capacity: float = CAPACITY,
    overflow: str = "rounds", imbalance: float = 1.0,
) -> Rule:  # fmt: skip
    """The gradients of weights sum over tokens, those of x and scores over experts and their inner dim."""
    del activation, slope, overflow
    tokens = [(grad, "t:sum d!"), (x, "t:sum d!"), (ids, "t:sum k!"), (scores, "t:sum k!")]
    left = [named_dims(one, text.split()) for one, text in tokens]
    weights = _weights(up, up_bias, down, down_bias)
    named = dict(zip(_present(up_bias, down_bias), weights, strict=True))
    every = set(range(4 + len(weights)))
    order = ["up", "down", *(name for name in named if name.endswith("bias"))] if learns else []
    reads = [every, every, *({0, 2, 3} if name == "down_bias" else every for name in order)]
    k, size = ids.shape[1], x.element_size()
    rows, numbers = Send(all_to_all_rows, ("t", "d"), size, elements=k), scores.element_size()
    sends = {
        "e": [
            _told(up.shape[0]), rows, rows, rows,
            Send(all_to_all_rows, ("t",), numbers, elements=k), Send(all_to_all_rows, ("t",), size, elements=k),
        ]
    }  # fmt: skip
    bound = RowBound("t", "e", k, up.shape[0], capacity)
    work = (
        *_work(backward_elements(up.shape[1]), size, bound, up.shape[1] if learns else 0),
        *_last_product(up.shape[1], size, bound),
    )
    memory = *work, *_total(size, bound), *_places(k, bound, 3)
    exchanging = *work, *_travel(3, size, bound), *_places(k, bound, 3, exchanged=True)
    return parse(
        f"{', '.join([*left, *weights])} -> {', '.join([left[1], left[3], *(named[name] for name in order)])}",
        [{0}], reads, flops=_products(up, ids, 3 * up.shape[1] + 2 if learns else 2 * up.shape[1] + 1),
        multiplied=[0], workspace=memory,
        variants=_variants(
            experts_parts.experts_in_parts_backward, experts_parts.experts_exchanged_backward, sends, memory,
            exchanging, imbalance,
        ),
    )  # fmt: skip


def _present(up_bias: Tensor | None, down_bias: Tensor | None) -> list[str]:
    names: Mapping[str, Tensor | bool | None] = {"up": True, "up_bias": up_bias, "down": True, "down_bias": down_bias}
    return [name for name, one in names.items() if one is not None]


def _work(elements: tuple[int, int], size: int, bound: RowBound, gradients: int) -> tuple[Workspace, ...]:
    """While rows are in work: values of width d and of width f for each that may come. The result by token is not yet
    there, nor are the gradients of up, of which a gate and what it gates have `gradients`."""
    outer, inner = elements
    return (
        Workspace(("d",), size, outer, bound=bound),
        Workspace(("f",), size, inner, bound=bound),
        Workspace(("t", "d"), size, -1),
        Workspace(("e", "f", "d"), size, -gradients),
    )


def _places(k: int, bound: RowBound, stages: int, *, exchanged: bool = False) -> tuple[Workspace, ...]:
    """Integers: the expert and the place of each row of this rank's tokens, and where it is in their order while they
    are summed; of rows that were exchanged the same of those that came."""
    own = [Workspace(("t",), 8, (3 if stage == 1 else 2) * k, stage=stage) for stage in range(stages)]
    came = [Workspace((), 8, 2, stage=stage, bound=bound) for stage in range(stages)] if exchanged else []
    return *own, *came


def _last_product(count: int, size: int, bound: RowBound) -> tuple[Workspace, ...]:
    """While backward makes the gradients of rows: these, what rows came in, and the gradients of `up @ x`."""
    return (
        Workspace(("d",), size, 3, stage=2, bound=bound),
        Workspace(("f",), size, count, stage=2, bound=bound),
        Workspace(("t", "d"), size, -1, stage=2),
    )


def _total(size: int, bound: RowBound) -> tuple[Workspace, ...]:
    """While rows are summed by token: the rows, those of one k twice, and the sum, if that is wider than the result."""
    wide = Workspace(("t", "d"), 4, 1, stage=1) if size < 4 else Workspace(("t", "d"), size, 0, stage=1)
    return Workspace(("d",), size, 1, stage=1, bound=bound), Workspace(("t", "d"), size, 2, stage=1), wide


def _travel(copies: int, size: int, bound: RowBound) -> tuple[Workspace, ...]:
    """While rows travel: those of this rank's tokens, and `copies` of what may come: as they came and by expert, and in
    backward other rows that came before. The result by token is not yet there."""
    return Workspace(("d",), size, copies, stage=1, bound=bound), Workspace(("t", "d"), size, bound.each - 1, stage=1)
