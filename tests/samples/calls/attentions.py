"""Sample calls of attention with grouped queries, sinks, windows, soft caps and dropout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from samples.calls.sample import Sample, boolean, real

FORWARD, BACKWARD = torch.ops.shardc.attention.default, torch.ops.shardc.attention_backward.default

# heads of q, queries, keys, value dim, then mask, sinks, whether weights are dropped, causal, window, soft cap
CALLS: tuple[tuple[Any, ...], ...] = (
    ((2, 3), 6, 8, 2, None, False, False, True, 0, 0.0),
    ((2, 2), 4, 6, 3, (2, 1, 1, 4, 6), True, False, False, 0, 0.0),
    ((1, 4), 6, 6, 2, None, True, False, True, 3, 0.0),
    ((4,), 5, 7, 2, None, False, False, False, 2, 1.5),
    ((4,), 6, 6, 2, (6, 6), True, False, True, 4, 0.7),
    ((4,), 6, 6, 2, None, False, True, False, 0, 0.0),
    ((2, 2), 5, 6, 2, None, True, True, True, 4, 1.5),
)


def attentions() -> Iterator[Sample]:
    for heads, rows, columns, outer, shape, sinking, dropping, causal, window, softcap in CALLS:
        q, k, v = real(2, *heads, rows, 2), real(2, heads[0], columns, 2), real(2, heads[0], columns, outer)
        mask = None if shape is None else boolean(*shape) if window else real(*shape)
        sinks, draw = (
            real(*heads) if sinking else None,
            torch.Generator().manual_seed(5).get_state() if dropping else None,
        )
        literals = (causal, 0.5, window, softcap, 0.25 if dropping else 0.0)
        yield Sample(FORWARD, (q, k, v, mask, sinks, draw, *literals))
        out, total = FORWARD(q, k, v, mask, sinks, draw, *literals)
        yield Sample(BACKWARD, (real(*out.shape), q, k, v, mask, sinks, draw, out, total, *literals))
