"""Attention as one operator with one backward, whatever the device: what the compiler captures, splits and emits.

Shapes:

    q          [batch, heads, q_length, head_dim]
    k          [batch, heads, length, head_dim]
    v          [batch, heads, length, value_dim]
    mask       broadcasts to [batch, heads, q_length, length]; bool: True takes part; float: added to the scores
    logsumexp  [batch, heads, q_length], contiguous, float32 unless q is float64

The result has the strides that eager mode gives it: those of q, where flash kernels take the operands. Most often q has
the heads of a position side by side in memory, so that joining the heads is a view. Gradients always have this layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardc.runtime.errors import RankError

__all__ = ["attention", "attention_backward"]

_INFINITY = float("inf")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which scores are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as a 4-D tensor to add to the scores."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), -_INFINITY)
    return _rows(mask.to(dtype).reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)))


def _rows(x: Tensor) -> Tensor:
    """`x` with the elements of a row side by side in memory. The flash kernel reads out of bounds otherwise."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _by_position(x: Tensor) -> Tensor:
    """`x` with the heads of a position side by side in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _as_eager(out: Tensor, q: Tensor, mask: Tensor | None) -> Tensor:
    """`out` with the strides of eager mode's result."""
    return _by_position(out) if _heads_inside(q, out.shape[-1], mask) else out.contiguous()


def _heads_inside(q: Tensor, width: int, mask: Tensor | None) -> bool:
    """Whether eager mode's result has the heads of a position side by side in memory.

    It has if q has, and if eager mode's flash kernels take the operands.
    """
    return q.stride(1) < q.stride(2) and width == q.shape[-1] and (mask is None or mask.dim() in (2, 4))


def _has_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether the CPU's flash kernel takes these operands."""
    return (
        q.device.type == "cpu"
        and q.shape[-1] == k.shape[-1] == v.shape[-1]
        and q.shape[:2] == k.shape[:2] == v.shape[:2]
        and min(q.numel(), k.numel()) > 0
        and not (causal and mask is not None)
    )


def scores_of(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, ahead: int = 0) -> Tensor:
    """`scale * q @ k^T + mask`. The first query is `ahead` positions after the first key."""
    dtype = compute_dtype(q.dtype)
    scores = torch.matmul(q.to(dtype), k.to(dtype).transpose(-2, -1)) * scale
    bias = _bias(mask, dtype)
    if bias is not None:
        scores = scores + bias
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(ahead)
        scores = scores.masked_fill(keep.logical_not(), -_INFINITY)
    return scores


def seen(logsumexp: Tensor) -> Tensor:
    """The log-sum-exp, with zeros for rows where everything is masked, as the CPU's kernel returns it."""
    return logsumexp.masked_fill(logsumexp == -_INFINITY, 0.0)


def weights_of(scores: Tensor, logsumexp: Tensor) -> Tensor:
    """Softmax of the scores; zeros in rows where everything is masked."""
    return torch.exp(scores - seen(logsumexp).unsqueeze(-1))


def gradients_of(
    scores: Tensor, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from the gradient of `out`, given the scores (Dao et al. 2022, appendix B.2)."""
    dtype, weights = scores.dtype, weights_of(scores, logsumexp)
    upper = grad.to(dtype)
    inner = torch.matmul(upper, v.to(dtype).transpose(-2, -1)) - (upper * out.to(dtype)).sum(-1, keepdim=True)
    slope = weights * inner * scale
    grad_q = torch.matmul(slope, k.to(dtype))
    grad_k = torch.matmul(slope.transpose(-2, -1), q.to(dtype))
    grad_v = torch.matmul(weights.transpose(-2, -1), upper)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


@torch.library.custom_op("shardc::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`softmax(scale * q @ k^T + mask) @ v` and the logsumexp of the scores.

    Returns the result `[batch, heads, q_length, value_dim]` and logsumexp. With `causal`, query i sees keys 0 to i.
    Rows that see nothing give zeros. A mask gets no gradient: RankError if it requires one.
    """
    if _has_kernel(q, k, v, mask, causal):
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(_rows, (q, k, v)), 0.0, causal, attn_mask=_bias(mask, q.dtype), scale=scale
        )
        return _as_eager(out, q, mask), logsumexp.contiguous()
    scores = scores_of(q, k, mask, causal, scale)
    logsumexp = seen(torch.logsumexp(scores, -1))
    out = torch.matmul(weights_of(scores, logsumexp), v.to(scores.dtype)).to(q.dtype)
    return _as_eager(out, q, mask), logsumexp


@torch.library.custom_op("shardc::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from the gradient of `out`; `out` and `logsumexp` are what `attention` returned."""
    if _has_kernel(q, k, v, mask, causal):
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(_rows, (grad, q, k, v, out)), logsumexp, 0.0, causal, attn_mask=_bias(mask, q.dtype), scale=scale
        )
    else:
        grads = gradients_of(scores_of(q, k, mask, causal, scale), grad, q, k, v, out, logsumexp, scale)
    return _by_position(grads[0]), _by_position(grads[1]), _by_position(grads[2])


def _empty_by_position(x: Tensor, size: int | None = None) -> Tensor:
    batch, heads, length, width = x.shape
    return x.new_empty((batch, length, heads, width if size is None else size)).transpose(1, 2)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    shape = *q.shape[:-1], v.shape[-1]
    out = _empty_by_position(q, v.shape[-1]) if _heads_inside(q, v.shape[-1], mask) else q.new_empty(shape)
    return out, q.new_empty(q.shape[:-1], dtype=compute_dtype(q.dtype))


@attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_by_position(q), _empty_by_position(k), _empty_by_position(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, causal, scale = inputs
    if mask is not None and mask.requires_grad:
        raise RankError(
            "shardc::attention gives no gradient for its mask: detach it, or write attention with matmul and softmax"
        )
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.causal, ctx.scale = causal, scale


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, mask, out, logsumexp = ctx.saved_tensors
    grads = attention_backward(grad, q, k, v, mask, out, logsumexp, ctx.causal, ctx.scale)
    return (*grads, None, None, None)


def _second(ctx: Any, *grads: Tensor | None) -> None:
    raise RankError(
        "fused attention has no second derivative: call scaled_dot_product_attention under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


attention.register_autograd(_backward, setup_context=_setup)
attention_backward.register_autograd(_second)
