"""Attention where a rank holds part `r` of the queries, part `s` of the keys and values, or both.

Shapes are those of `shardc.runtime.kernels.attention`. Over split keys, the ranks all-reduce only each query's
log-sum-exp and result. Over split queries, they send nothing. Parts `b` of the batch, `h` of the heads and `g` of the
group are given only where there is dropout: a rank draws what the single device draws for its part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardc.runtime.kernels.attention_blocks import Literals, compute_dtype, grouped, scores_of, seen
from shardc.runtime.kernels.attention_dropout import kept
from shardc.runtime.kernels.parts import Part

__all__ = ["attention_in_parts", "attention_in_parts_backward"]

_NOTHING = float("-inf")


def attention_in_parts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, draw: Tensor | None, causal: bool,
    scale: float, window: int, softcap: float, dropout: float, *, b: Part | None = None, h: Part | None = None,
    g: Part | None = None, r: Part | None = None, s: Part | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`shardc::attention`: the result and the log-sum-exp of the scores, both complete.

    The results of the parts are weighed by their log-sum-exp (Dao et al. 2022, section 3.1).
    """
    literals = Literals(causal, scale, window, softcap, dropout)
    scores, _ = _scores(q, k, mask, literals, r, s)
    logsumexp = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - seen(logsumexp).unsqueeze(-1))
    if draw is not None:
        weights = weights * _kept(draw, scores, dropout, (b, h, g, r, s))
    values = (s.fill(v, 2, 0) if s else v).to(scores.dtype)
    result = torch.matmul(weights, values.unsqueeze(2))
    if s is not None:
        top = s.reduce(logsumexp, "max")
        share = torch.exp(logsumexp - seen(top))
        total = s.reduce(share)
        result = s.reduce(result * share.unsqueeze(-1)) / total.masked_fill(total == 0, 1).unsqueeze(-1)
        logsumexp = torch.log(total) + seen(top)
    if sinks is not None:
        total = torch.logaddexp(logsumexp, _by_row(sinks, logsumexp))
        result, logsumexp = result * torch.exp(logsumexp - total).unsqueeze(-1), total
    if q.dim() == 4:
        result, logsumexp = result.squeeze(2), logsumexp.squeeze(2)
    return result.to(q.dtype), seen(logsumexp)


def attention_in_parts_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, draw: Tensor | None,
    out: Tensor, logsumexp: Tensor, causal: bool, scale: float, window: int, softcap: float, dropout: float, *,
    b: Part | None = None, h: Part | None = None, g: Part | None = None, r: Part | None = None, s: Part | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`shardc::attention_backward`: where a gradient sums over a split dim, this rank's addend of it.

    Source: Dao et al. 2022, appendix B.2.
    """
    if s is not None:
        k, v = s.fill(k, 2, 0), s.fill(v, 2, 0)
    if r is not None:
        grad, q, out, logsumexp = (r.fill(x, q.dim() - 2, 0) for x in (grad, q, out, logsumexp))
    literals = Literals(causal, scale, window, softcap, dropout)
    scores, slope = _scores(q, k, mask, literals, r, s)
    dtype, summed = scores.dtype, grouped(logsumexp, 2) if q.dim() == 4 else logsumexp
    weights = torch.exp(scores - summed.unsqueeze(-1))
    upper, ours = grouped(grad).to(dtype), grouped(out).to(dtype)
    delta = (upper * ours).sum(-1)
    inner, dropped = torch.matmul(upper, v.to(dtype).unsqueeze(2).transpose(-2, -1)), weights
    if draw is not None:
        factors = _kept(draw, scores, dropout, (b, h, g, r, s))
        inner, dropped = inner * factors, weights * factors
    change = weights * (inner - delta.unsqueeze(-1)) * scale
    if slope is not None:
        change = change * slope
    grad_q = torch.matmul(change, k.to(dtype).unsqueeze(2))
    grad_k = torch.matmul(change.transpose(-2, -1), grouped(q).to(dtype)).sum(2)
    grad_v = torch.matmul(dropped.transpose(-2, -1), upper).sum(2)
    grad_q = grad_q.squeeze(2) if q.dim() == 4 else grad_q
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), _grad_sinks(sinks, summed, delta, q, r)


def _grad_sinks(sinks: Tensor | None, logsumexp: Tensor, delta: Tensor, q: Tensor, r: Part | None) -> Tensor:
    if sinks is None:
        return q.new_zeros(1)
    share = torch.exp(_by_row(sinks, logsumexp) - logsumexp) * delta
    if r is not None:
        share = r.fill(share, 3, 0)
    return -share.sum((0, 3)).reshape(sinks.shape).to(sinks.dtype)


def _by_row(sinks: Tensor, logsumexp: Tensor) -> Tensor:
    """The sinks, to be used beside a log-sum-exp `[batch, kv_heads, group, q_length]`."""
    return sinks.to(logsumexp.dtype).view(1, *logsumexp.shape[1:3], 1)


def _kept(draw: Tensor, scores: Tensor, dropout: float, parts: Sequence[Part | None]) -> Tensor:
    shape = tuple(part.size if part else n for part, n in zip(parts, scores.shape, strict=True))
    whole = kept(draw, shape, dropout).to(scores.dtype)
    for dim, part in enumerate(parts):
        if part is not None:
            whole = whole.narrow(dim, min(part.start, part.size), part.valid)
            padding = [0] * 2 * (scores.dim() - 1 - dim) + [0, part.length - part.valid]
            whole = torch.nn.functional.pad(whole, padding)
    return whole


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, literals: Literals, r: Part | None, s: Part | None
) -> tuple[Tensor, Tensor | None]:
    """The scores of the rank's queries and keys. Keys and queries in the padding are masked."""
    if mask is not None and q.dim() == 4:
        mask = mask.to(compute_dtype(q.dtype)) if mask.dtype != torch.bool else mask
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)).unsqueeze(2)
    queries = _positions(r, q.shape[-2], q.device)
    keys = _positions(s, k.shape[-2], q.device)
    scores, slope = scores_of(grouped(q), k, mask, literals, queries, keys)
    scores = s.fill(scores, 4, _NOTHING) if s else scores
    return r.fill(scores, 3, _NOTHING) if r else scores, slope


def _positions(part: Part | None, length: int, device: torch.device) -> Tensor:
    return torch.arange(length, device=device) + (part.start if part else 0)
