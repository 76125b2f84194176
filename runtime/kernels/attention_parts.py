"""Attention where a rank holds part `r` of the queries, part `s` of the keys and values, or both.

Shapes are those of `shardc.runtime.kernels.attention`. Over split keys, the ranks all-reduce only each query's
log-sum-exp and result. Over split queries, they send nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardc.runtime.kernels.attention import gradients_of, scores_of, seen, weights_of
from shardc.runtime.kernels.parts import Part

__all__ = ["attention_in_parts", "attention_in_parts_backward"]

_NOTHING = float("-inf")


def attention_in_parts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, *, r: Part | None = None,
    s: Part | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`shardc::attention`: the result and the log-sum-exp of the scores, both complete.

    The results of the parts are weighed by their log-sum-exp (Dao et al. 2022, section 3.1).
    """
    scores = _scores(q, k, mask, causal, scale, r, s)
    logsumexp = torch.logsumexp(scores, -1)
    values = (s.fill(v, 2, 0) if s else v).to(scores.dtype)
    result = torch.matmul(weights_of(scores, logsumexp), values)
    if s is not None:
        top = s.reduce(logsumexp, "max")
        share = torch.exp(logsumexp - seen(top))
        total = s.reduce(share)
        result = s.reduce(result * share.unsqueeze(-1)) / total.masked_fill(total == 0, 1).unsqueeze(-1)
        logsumexp = torch.log(total) + seen(top)
    return result.to(q.dtype), seen(logsumexp)


def attention_in_parts_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, logsumexp: Tensor, causal: bool,
    scale: float, *, r: Part | None = None, s: Part | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`shardc::attention_backward`: where a gradient sums over a split dim, this rank's addend of it."""
    if s is not None:
        k, v = s.fill(k, 2, 0), s.fill(v, 2, 0)
    if r is not None:
        grad, q, out, logsumexp = (r.fill(x, 2, 0) for x in (grad, q, out, logsumexp))
    return gradients_of(_scores(q, k, mask, causal, scale, r, s), grad, q, k, v, out, logsumexp, scale)


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, r: Part | None, s: Part | None
) -> Tensor:
    """The scores of the rank's queries and keys. Keys and queries in the padding are masked."""
    scores = scores_of(q, k, mask, causal, scale, (r.start if r else 0) - (s.start if s else 0))
    scores = s.fill(scores, 3, _NOTHING) if s else scores
    return r.fill(scores, 2, _NOTHING) if r else scores
