"""Attention where a rank holds part `r` of the queries, part `s` of the keys and values, or both.

Shapes are those of `shardc.runtime.kernels.attention`. Over split keys, the ranks all-reduce only each query's
log-sum-exp and result. Over split queries, they send nothing. Parts `b` of the batch, `h` of the heads and `g` of the
group are given only where there is dropout: a rank draws what the single device draws for its part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardc.runtime.kernels.attention.blocks import attend, attend_backward, compute_dtype, heads_inside, seen
from shardc.runtime.kernels.attention.dropout import Dropping, dropping_from
from shardc.runtime.kernels.attention.mask_function import Mask, MaskFunction
from shardc.runtime.kernels.attention.one_kernel import by_one_kernel, by_one_kernel_backward
from shardc.runtime.kernels.attention.pieces import Literals, Runs
from shardc.runtime.kernels.parts import Part
from shardc.runtime.mesh.mesh import TIME, microbatches

__all__ = ["attention_in_parts", "attention_in_parts_backward"]


def attention_in_parts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, draw: Tensor | None, causal: bool,
    scale: float, window: int, softcap: float, dropout: float, of_queries: Tensor | None = None,
    of_keys: Tensor | None = None, sees: str = "", *, b: Part | None = None, h: Part | None = None,
    g: Part | None = None, r: Part | None = None, s: Part | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`shardc::attention`: the result and the log-sum-exp of the scores, both complete.

    The results of the parts are weighed by their log-sum-exp (Dao et al. 2022, section 3.1).
    """
    if r is None and s is None and sinks is None and draw is None and of_queries is None:
        made = by_one_kernel(q, k, v, mask, causal, scale, window, softcap)
        if made is not None:
            return made
    literals, ours = Literals(causal, scale, window, softcap, dropout), grouped(q)
    dropping = dropping_of(draw, literals, ours, k, (b, h, g, r, s))
    rows, columns = runs_of(r, q.shape[-2]), runs_of(s, k.shape[2])
    out, logsumexp = attend(ours, k, v, mask_of(mask, q, of_queries, of_keys, sees), literals, rows, columns, dropping)
    if s is not None:
        out, logsumexp = _over_keys(out.to(logsumexp.dtype), logsumexp, s, heads_inside(ours))
    return finished(out, logsumexp, sinks, q)


def attention_in_parts_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, draw: Tensor | None,
    out: Tensor, logsumexp: Tensor, causal: bool, scale: float, window: int, softcap: float, dropout: float,
    of_queries: Tensor | None = None, of_keys: Tensor | None = None, sees: str = "", *, b: Part | None = None,
    h: Part | None = None, g: Part | None = None, r: Part | None = None, s: Part | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`shardc::attention_backward`: where a gradient sums over a split dim, this rank's addend of it."""
    if r is None and s is None and sinks is None and draw is None and of_queries is None:
        grads = by_one_kernel_backward(grad, q, k, v, mask, out, logsumexp, causal, scale, window, softcap)
        if grads is not None:
            return *grads, q.new_zeros(1)
    literals, ours, upper, made = Literals(causal, scale, window, softcap, dropout), *map(grouped, (q, grad, out))
    total = logsumexp.unsqueeze(2) if q.dim() == 4 else logsumexp
    dropping = dropping_of(draw, literals, ours, k, (b, h, g, r, s))
    rows, columns = runs_of(r, q.shape[-2]), runs_of(s, k.shape[2])
    grad_q, grad_k, grad_v = attend_backward(
        upper, ours, k, v, mask_of(mask, q, of_queries, of_keys, sees), made, total, literals, rows, columns, dropping
    )
    batch = b.valid if b else len(q)
    own = upper[:batch], made[:batch], total[:batch]
    grad_sinks = q.new_zeros(1) if sinks is None else grad_of_sinks(sinks, *own, rows)
    return grad_q.squeeze(2) if q.dim() == 4 else grad_q, grad_k, grad_v, grad_sinks


def _over_keys(out: Tensor, logsumexp: Tensor, s: Part, turned: bool) -> tuple[Tensor, Tensor]:
    """The result and log-sum-exp over the keys of all ranks. The result travels as it most often lies in memory, or
    collectives would copy it: `turned`, the heads of a position are side by side."""
    top = seen(s.reduce(logsumexp, "max"))
    share = torch.exp(logsumexp - top)
    total = s.reduce(share)
    weighed = out.mul_(share.unsqueeze(-1))
    out = s.reduce(weighed.movedim(-2, 1)).movedim(1, -2) if turned else s.reduce(weighed)
    return out.div_(total.masked_fill(total == 0, 1).unsqueeze(-1)), torch.log(total) + top


def grouped(x: Tensor) -> Tensor:
    """Queries, or what has a row for each of them, with a dim for the group."""
    return x if x.dim() == 5 else x.unsqueeze(2)


def mask_of(
    mask: Tensor | None, q: Tensor, of_queries: Tensor | None = None, of_keys: Tensor | None = None, sees: str = ""
) -> Mask | None:
    """The mask with the five dims of the scores, or ones; or with a function that masks besides."""
    if mask is not None:
        mask = grouped(mask.reshape((1,) * (q.dim() - mask.dim()) + tuple(mask.shape)))
    return mask if of_queries is None or of_keys is None else MaskFunction(of_queries, of_keys, sees, mask)


def runs_of(part: Part | None, length: int) -> Runs:
    """The positions of the rank's queries or keys, without padding."""
    return [(0, length)] if part is None else part.runs


def dropping_of(
    draw: Tensor | None, literals: Literals, q: Tensor, k: Tensor, parts: Sequence[Part | None]
) -> Dropping | None:
    """What drops the weights of the rank; `q` has a group. In a micro-batch, `q` has that part of the batch."""
    if draw is None:
        return None
    local, (b, *others) = (*q.shape[:-1], k.shape[2]), parts
    shape = [part.size if part else n for part, n in zip(parts, local, strict=True)]
    if microbatches() > 1:
        shape[0] *= microbatches()
        b = Part((TIME, *(b.axes if b else ())), shape[0])
    return dropping_from(draw, literals.dropout, q.dtype, shape, (b, *others[:2]))


def finished(out: Tensor, logsumexp: Tensor, sinks: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor]:
    """What the operator returns for queries `q`, from the result and log-sum-exp over all keys. Sinks are one more key
    for each head, whose value is zero."""
    if sinks is not None:
        total = torch.logaddexp(logsumexp, _by_row(sinks, logsumexp))
        out, logsumexp = out * torch.exp(logsumexp - total).unsqueeze(-1), total
    if q.dim() == 4:
        out, logsumexp = out.squeeze(2), logsumexp.squeeze(2)
    return out.to(q.dtype), seen(logsumexp)


def grad_of_sinks(sinks: Tensor, grad: Tensor, out: Tensor, logsumexp: Tensor, rows: Runs) -> Tensor:
    """The gradient of the sinks from the rank's queries."""
    count = sum(length for _, length in rows)
    dtype, total = compute_dtype(out.dtype), logsumexp[..., :count]
    delta = (grad[..., :count, :].to(dtype) * out[..., :count, :]).sum(-1)
    share = torch.exp(_by_row(sinks, total) - total) * delta
    return -share.sum((0, 3)).reshape(sinks.shape).to(sinks.dtype)


def _by_row(sinks: Tensor, logsumexp: Tensor) -> Tensor:
    """The sinks, to be used beside a log-sum-exp `[batch, kv_heads, group, q_length]`."""
    return sinks.to(logsumexp.dtype).view(1, *logsumexp.shape[1:3], 1)
