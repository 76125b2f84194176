"""A mixture of experts as one operator with one backward, whatever the routing: what the compiler captures and splits.

    x            [tokens, d]
    ids          [tokens, k]: the experts that a token goes to
    scores       [tokens, k]: what their results are multiplied by, in any floating type
    up           [experts, g, f, d]: g is 1, or 2 for a gate and what it gates
    up_bias      None, or [experts, g, f]
    down         [experts, d, f];  down_bias  None, or [experts, d]
    result       [tokens, d]: the sum over k of scores times `down @ activation(up @ x)`

`activation` is a formula (formulas.py) of `gate` and `up` where g is 2, of `up` alone where it is 1, and `slope` one of
these and `grad`, for their gradients. Backward computes `up @ x` and the activation again, and keeps no value a row.

`capacity` and `overflow` speak to the bodies of experts_parts.py; `imbalance` speaks to the planner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardc.runtime.errors import RankError
from shardc.runtime.kernels.mixture.formulas import formula
from shardc.runtime.kernels.mixture.grouped import RowGroups

__all__ = ["experts", "experts_backward"]


CAPACITY = 2.0
"""The rows for which a rank has room, in multiples of the mean, where nothing else is asked."""


class Routing:
    """The rows of tokens that go to `count` experts from number `first` on, those of one expert side by side.

    `groups` are the rows by expert, and `expert` is the expert of every row, counted from `first`. If `every`, no token
    goes to others, so that the number of rows is known without waiting for the device. There is `room` for so many
    experts; those past `count` are padding.
    """

    def __init__(self, ids: Tensor, first: int, count: int, every: bool, room: int = 0) -> None:
        self.tokens, self.k = ids.shape
        local = ids.reshape(-1) - first
        inside = (local >= 0) & (local < count)
        key = local if every else torch.where(inside, local, count)
        self.expert, order = torch.sort(key, stable=True)
        edges = torch.arange(count + 1, device=key.device, dtype=key.dtype)
        counts = torch.searchsorted(self.expert, edges).diff()
        self.groups = RowGroups(F.pad(counts, (0, room - count)) if room > count else counts)
        self.every = every
        if not every:
            kept = sum(self.groups.sizes)
            self.expert, order = self.expert[:kept], order[:kept]
        self.order = order

    def rows(self, x: Tensor) -> Tensor:
        """The rows of tokens `[tokens, n]`, one for each expert that a token goes to."""
        return x.index_select(0, self.order // self.k)

    def entries(self, x: Tensor) -> Tensor:
        """The rows of a value `[tokens, k]`."""
        return x.reshape(-1).index_select(0, self.order)

    def each(self, rows: Tensor) -> Tensor:
        """`[tokens, k]` from one number a row, zero where there is no row."""
        return rows.new_zeros(self.tokens * self.k).index_copy_(0, self.order, rows).view(self.tokens, self.k)

    def total(self, rows: Tensor, scores: Tensor | None = None) -> Tensor:
        """The sum over k of the rows of every token, times their scores: `[tokens, n]`, in the widest type."""
        wide = rows.dtype if rows.dtype == torch.float64 else torch.float32
        result = torch.zeros(self.tokens, rows.shape[1], dtype=wide, device=rows.device)
        if not rows.shape[0]:
            return result
        place = torch.full((self.tokens * self.k,), -1, dtype=torch.int64, device=rows.device)
        place[self.order] = torch.arange(rows.shape[0], device=rows.device)
        for column in range(self.k):
            at = place.view(self.tokens, self.k)[:, column]
            taken = rows.index_select(0, at.clamp(min=0))
            if scores is not None:
                taken = taken * scores[:, column, None]
            if not self.every:
                taken = taken.masked_fill((at < 0).unsqueeze(1), 0)
            result += taken
        return result


def _flat(up: Tensor) -> tuple[Tensor, bool]:
    """The weight `[experts, g f, d]`, or, where the gate's rows lie between the others', `[experts, f g, d]`."""
    between = up.shape[1] > 1 and up.stride(1) < up.stride(2)
    return (up.transpose(1, 2) if between else up).flatten(1, 2), between


def _halves(rows: Tensor, count: int, between: bool) -> tuple[Tensor, ...]:
    if count == 1:
        return (rows,)
    return rows.unflatten(1, (rows.shape[1] // count, count)).unbind(2) if between else rows.chunk(count, 1)


def _names(count: int) -> tuple[str, ...]:
    return ("gate", "up")[2 - count :]


def hidden(groups: RowGroups, expert: Tensor, rows: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """`up @ row + bias` of every row, gate and the rest side by side or in turns, as in `up`."""
    weight, between = _flat(up)
    result = groups.times(rows, weight)
    if bias is not None:
        flat = (bias.transpose(1, 2) if between else bias).flatten(1)
        result += flat.index_select(0, expert)
    return result


@dataclass
class Gradients:
    """Gradients of the scores and of the rows, one a row, and those of weights that learn."""

    scores: Tensor
    rows: Tensor | None = None
    up: Tensor | None = None
    up_bias: Tensor | None = None
    down: Tensor | None = None
    down_bias: Tensor | None = None

    def in_order(self, x: Tensor, scores: Tensor) -> list[Tensor]:
        """What `experts_backward` returns, with the gradients of x and scores by token."""
        every = x, scores, self.up, self.down, self.up_bias, self.down_bias
        return [one for one in every if one is not None]


def forward_rows(
    groups: RowGroups, expert: Tensor, rows: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """`down @ activation(up @ row)` of every row."""
    inner = hidden(groups, expert, rows, up, up_bias)
    del rows
    count = up.shape[1]
    active = formula(activation, *_names(count))(*_halves(inner, count, _flat(up)[1]))
    del inner
    result = groups.times(active, down)
    return result if down_bias is None else result.add_(down_bias.index_select(0, expert))


def backward_rows(
    groups: RowGroups, expert: Tensor, grad: Tensor, rows: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None,
    down: Tensor, down_bias: Tensor | None, activation: str, slope: str, learns: bool, first: bool = True,
) -> Gradients:  # fmt: skip
    """The gradients of rows and of scores, a row each, and, if `learns`, of weights and biases.

    `grad` are the rows of the result's gradient, before they are multiplied by the scores. Only the `first` of the
    ranks that split f counts the bias.
    """
    count, (weight, between) = up.shape[1], _flat(up)
    inner = _halves(hidden(groups, expert, rows, up, up_bias), count, between)
    active = formula(activation, *_names(count))(*inner)
    upper = groups.times(grad, down.transpose(1, 2))
    grad_scores = torch.bmm(upper.unsqueeze(1), active.unsqueeze(2)).view(-1)
    scale = scores.unsqueeze(1)
    if down_bias is not None and first:
        grad_scores = grad_scores + (grad * down_bias.index_select(0, expert)).sum(1)
    grads = Gradients(grad_scores)
    if learns:
        grads.down = groups.products(grad, (active * scale).to(grad.dtype))
        grads.down_bias = None if down_bias is None else groups.sums((grad * scale).to(grad.dtype))
    del active, grad
    made = formula(slope, *_names(count), "grad")(*inner, upper.mul_(scale))
    del inner, upper
    halves = made if isinstance(made, tuple) else (made,)
    below = halves[0] if count == 1 else torch.stack(halves, 2).flatten(1) if between else torch.cat(halves, 1)
    del made, halves
    if learns:
        grads.up = _unflat(groups.products(below, rows), count, between)
        grads.up_bias = None if up_bias is None else _unflat(groups.sums(below), count, between)
    grads.rows = groups.times(below, weight.transpose(1, 2))
    return grads


def _unflat(grad: Tensor, count: int, between: bool) -> Tensor:
    if between:
        return grad.unflatten(1, (-1, count)).transpose(1, 2).contiguous()
    return grad.unflatten(1, (count, -1))


@torch.library.custom_op("shardc::experts", mutates_args=())
def experts(
    x: Tensor, ids: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    activation: str, slope: str, capacity: float = CAPACITY, overflow: str = "rounds", imbalance: float = 1.0,
) -> Tensor:  # fmt: skip
    """The experts' results, weighed and summed by token. Shapes are those of the module's docstring."""
    routing = Routing(ids, 0, up.shape[0], every=True)
    made = forward_rows(routing.groups, routing.expert, routing.rows(x), up, up_bias, down, down_bias, activation)
    return routing.total(made, scores).to(x.dtype)


@torch.library.custom_op("shardc::experts_backward", mutates_args=())
def experts_backward(
    grad: Tensor, x: Tensor, ids: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, slope: str, learns: bool, capacity: float = CAPACITY,
    overflow: str = "rounds", imbalance: float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x and scores and, if the weights learn, of up and down, and then of the biases that there
    are."""
    routing = Routing(ids, 0, up.shape[0], every=True)
    rows = routing.rows(grad), routing.rows(x), routing.entries(scores)
    grads = backward_rows(
        routing.groups, routing.expert, *rows, up, up_bias, down, down_bias, activation, slope, learns
    )  # fmt: skip
    del rows
    return by_token(grads, routing, lambda one: one, x, scores)


def by_token(
    grads: Gradients, routing: Routing, back: Callable[[Tensor], Tensor], x: Tensor, scores: Tensor
) -> list[Tensor]:
    """What `experts_backward` returns, where `back` brings rows to the tokens of `routing`."""
    rows, grads.rows = grads.rows, None
    assert rows is not None
    return grads.in_order(
        routing.total(back(rows)).to(x.dtype),
        routing.each(back(grads.scores.unsqueeze(1)).squeeze(1)).to(scores.dtype),
    )


@experts.register_fake
def _(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


@experts_backward.register_fake
def _(
    grad: Tensor, x: Tensor, ids: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, slope: str, learns: bool, *_: Any, **__: Any,
) -> list[Tensor]:  # fmt: skip
    like = [x, scores, *((up, down, up_bias, down_bias) if learns else ())]
    return [one.new_empty(one.shape) for one in like if one is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.told = inputs[7:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, ids, scores, up, up_bias, down, down_bias = ctx.saved_tensors
    activation, slope, *told = ctx.told
    learns = any(ctx.needs_input_grad[3:7])
    given = experts_backward(
        grad, x, ids, scores, up, up_bias, down, down_bias, activation, slope, learns, *told
    )  # fmt: skip
    biases = iter(given[4:])
    grads = [next(biases) if learns and bias is not None else None for bias in (up_bias, down_bias)]
    weights = (given[2], grads[0], given[3], grads[1]) if learns else (None,) * 4
    return given[0], None, given[1], *weights, *(None for _ in ctx.told)


def _second(ctx: Any, *grads: Tensor | None) -> None:
    raise RankError(
        "fused experts have no second derivative: write the experts with torch.nn.functional.linear, one by one"
    )


experts.register_autograd(_backward, setup_context=_setup)
experts_backward.register_autograd(_second)


def forward_elements(count: int) -> tuple[int, int]:
    """How many values of width d and of width f a row of the forward takes at most; `count` is g."""
    return 1, count + 2


def backward_elements(count: int) -> tuple[int, int]:
    """As `forward_elements`, of the backward."""
    return 2, 2 * count + 2
