"""Experts where a rank holds part `e` of the experts, part `f` of their inner dim, or both.

Shapes are those of fused.py. In `experts_in_parts`, a rank has the tokens of all: the results are addends, and nothing
is sent. In `experts_exchanged`, the ranks that split the experts split the tokens too, and rows travel
(row_exchange.py).

Where more than `capacity` times the mean of rows come to a rank, it takes the tokens in rounds, so that memory is
bounded whatever the routing. An exchange may also be asked to fail, or to drop what overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.kernels.mixture.fused import CAPACITY, Routing, backward_rows, by_token, forward_rows
from shardc.runtime.kernels.mixture.row_exchange import RowExchange
from shardc.runtime.kernels.parts import Part

__all__ = [
    "experts_exchanged", "experts_exchanged_backward", "experts_in_parts", "experts_in_parts_backward",
]  # fmt: skip

_Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
_Round = Callable[[slice], list[Tensor]]


def experts_in_parts(
    x: Tensor, ids: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    activation: str, slope: str, capacity: float = CAPACITY, *_: Any, e: Part | None = None, f: Part | None = None,
    **__: Any,
) -> Tensor:  # fmt: skip
    """`shardc::experts`: this rank's addend, of its experts' results for all tokens."""
    weights = _filled(up, up_bias, down, down_bias if _first(f) else None, f)

    def round_of(tokens: slice) -> list[Tensor]:
        routing = _local(ids[tokens], e, up.shape[0])
        made = forward_rows(routing.groups, routing.expert, routing.rows(x[tokens]), *weights, activation)
        return [routing.total(made, scores[tokens]).to(x.dtype)]

    return _joined(map(round_of, _local_rounds(ids, e, up.shape[0], capacity)), 1)[0]


def experts_in_parts_backward(
    grad: Tensor, x: Tensor, ids: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, slope: str, learns: bool, capacity: float = CAPACITY, *_: Any,
    e: Part | None = None, f: Part | None = None, **__: Any,
) -> list[Tensor]:  # fmt: skip
    """`shardc::experts_backward`: addends of the gradients of x and scores, and the gradients of its weights."""
    weights = _filled(up, up_bias, down, down_bias, f)

    def round_of(tokens: slice) -> list[Tensor]:
        routing = _local(ids[tokens], e, up.shape[0])
        rows = routing.rows(grad[tokens]), routing.rows(x[tokens]), routing.entries(scores[tokens])
        grads = backward_rows(routing.groups, routing.expert, *rows, *weights, activation, slope, learns, _first(f))
        del rows
        return by_token(grads, routing, lambda one: one, x, scores)

    return _joined(map(round_of, _local_rounds(ids, e, up.shape[0], capacity)), 2)


def experts_exchanged(
    x: Tensor, ids: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    activation: str, slope: str, capacity: float = CAPACITY, overflow: str = "rounds", *_: Any, e: Part,
    f: Part | None = None, **__: Any,
) -> Tensor:  # fmt: skip
    """`shardc::experts`: the results of this rank's tokens; of a split inner dim, this rank's addend."""
    weights = _filled(up, up_bias, down, down_bias if _first(f) else None, f)

    def round_of(tokens: slice, exchange: RowExchange) -> list[Tensor]:
        def made() -> Tensor:  # (nothing here may hold rows while others travel)
            arrived = exchange.there(exchange.routing.rows(x[tokens]))
            return forward_rows(exchange.groups, exchange.expert, arrived, *weights, activation)

        return [exchange.routing.total(exchange.back(made()), scores[tokens]).to(x.dtype)]

    return _joined((round_of(*one) for one in _exchanges(ids, e, capacity, overflow)), 1)[0]


def experts_exchanged_backward(
    grad: Tensor, x: Tensor, ids: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, slope: str, learns: bool, capacity: float = CAPACITY,
    overflow: str = "rounds", *_: Any, e: Part, f: Part | None = None, **__: Any,
) -> list[Tensor]:  # fmt: skip
    """`shardc::experts_backward`: the gradients of this rank's tokens, scores and weights."""
    weights = _filled(up, up_bias, down, down_bias, f)

    def round_of(tokens: slice, exchange: RowExchange) -> list[Tensor]:
        routing = exchange.routing
        rows = (
            exchange.there(routing.rows(grad[tokens])),
            exchange.there(routing.rows(x[tokens])),
            exchange.there(routing.entries(scores[tokens]).unsqueeze(1)).squeeze(1),
        )
        grads = backward_rows(exchange.groups, exchange.expert, *rows, *weights, activation, slope, learns, _first(f))
        del rows
        return by_token(grads, routing, exchange.back, x, scores)

    return _joined((round_of(*one) for one in _exchanges(ids, e, capacity, overflow)), 2)


def _exchanges(ids: Tensor, e: Part, capacity: float, overflow: str) -> Iterator[tuple[slice, RowExchange]]:
    """The tokens of each round, with their exchange. Every rank has as many rounds."""
    limit, every = math.ceil(capacity * ids.numel()), slice(None)
    exchange = RowExchange(ids, e, limit if overflow == "drop" else None)
    if overflow == "error":
        exchange.refuse_overflow(limit)
    if overflow != "rounds" or exchange.most <= limit:
        yield every, exchange
        return
    for tokens in _slices(ids, limit // (e.count * min(ids.shape[1], e.length))):
        yield tokens, RowExchange(ids[tokens], e)


def _local_rounds(ids: Tensor, e: Part | None, count: int, capacity: float) -> list[slice]:
    """The tokens of each round, so that no more than `capacity` times the mean of rows are in work at once."""
    if e is None:
        return [slice(None)]
    limit = math.ceil(capacity * ids.numel() * count / e.size)
    inside = int(((ids >= e.start) & (ids < e.start + e.valid)).sum())
    return [slice(None)] if inside <= limit else _slices(ids, limit // min(ids.shape[1], count))


def _slices(ids: Tensor, tokens: int) -> list[slice]:
    return [slice(start, start + max(tokens, 1)) for start in range(0, len(ids), max(tokens, 1))]


def _joined(rounds: Iterator[list[Tensor]], by_tokens: int) -> list[Tensor]:
    """The first results, which lie by token, side by side, and the sum of the others, over all rounds."""
    first, *others = rounds
    if not others:
        return first
    joined = [torch.cat([first[place], *(other[place] for other in others)]) for place in range(by_tokens)]
    for other in others:
        for total, more in zip(first[by_tokens:], other[by_tokens:], strict=True):
            total += more
    return [*joined, *first[by_tokens:]]


def _local(ids: Tensor, e: Part | None, count: int) -> Routing:
    return Routing(ids, 0, count, every=True) if e is None else Routing(ids, e.start, e.valid, every=False, room=count)


def _first(f: Part | None) -> bool:
    return f is None or f.index == 0


def _filled(up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, f: Part | None) -> _Weights:
    """The weights, with zeros in the padding of the inner dim."""
    if f is None:
        return up, up_bias, down, down_bias
    return f.fill(up, 2, 0), None if up_bias is None else f.fill(up_bias, 2, 0), f.fill(down, 2, 0), down_bias
