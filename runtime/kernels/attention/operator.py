"""Attention as one operator with one backward, whatever the device: what the compiler captures, splits and emits.

Shapes:

    q          [batch, heads, q_length, head_dim], or [batch, kv_heads, group, q_length, head_dim]
    k          [batch, kv_heads, length, head_dim]
    v          [batch, kv_heads, length, value_dim]
    mask       broadcasts to [*heads of q, q_length, length]; bool: True takes part; float: added to the scores
    sinks      [heads] or [kv_heads, group]: the logit of one more key of each head, whose value is zero
    draw       what `attention_draw` returned, or a seed, bytes `[8]` (see dropout.py)
    logsumexp  [*heads of q, q_length], contiguous, float32 unless q is float64; sinks count
    of_queries, of_keys    integers [n, batch or 1, q_length] and [m, batch or 1, length], of which `sees` is a formula

Query i sees key j where `j <= i`, if `causal`; where `window` is not 0, also `i - window < j`, and `j < i + window`
if not causal. With `softcap`, scores become `softcap * tanh(scores / softcap)` before the mask. `dropout` is the
probability with which a weight is dropped. Where `sees` is given, a query sees the keys for which it is true
(mask_function.py), among those that the rest lets it see.

The result has the strides that eager mode gives it: those of q, where flash kernels take the operands. Most often q has
the heads of a position side by side in memory, so that joining the heads is a view. Gradients always have this layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardc.runtime.errors import RankError
from shardc.runtime.kernels.attention import parts
from shardc.runtime.kernels.attention.blocks import compute_dtype
from shardc.runtime.kernels.bernoulli import state_of_draw
from shardc.runtime.kernels.mersenne import STATE

__all__ = ["attention", "attention_backward"]


def _by_position(x: Tensor) -> Tensor:
    """`x` with the heads of a position side by side in memory."""
    *heads, length, width = x.shape
    row = math.prod(heads[1:]) * width
    if x.dim() == 4 and x.stride() == (length * row, width, row, 1):  # as most kernels make it
        return x
    if x.dim() == 5 and x.stride() == (length * row, heads[2] * width, width, row, 1):
        return x
    if x.dim() == 5:
        return x.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _heads_inside(q: Tensor, width: int, mask: Tensor | None, dropout: float) -> bool:
    """Whether eager mode's result has the heads of a position side by side in memory.

    It has if q has, and if eager mode's flash kernels take the operands.
    """
    inside = q.stride(-3) < q.stride(-2) and width == q.shape[-1]
    return inside and dropout == 0 and (mask is None or mask.dim() in (2, q.dim()))


@torch.library.custom_op("shardc::attention_draw", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def attention_draw(like: Tensor, shape: Sequence[int]) -> Tensor:
    """What the dropout mask of scores of `shape` is drawn from, in the type of `like` and on its device: the state of
    the generator, bytes `[5056]`.

    It advances the random stream as dropout of the scores does in eager mode.
    """
    return state_of_draw(torch.default_generator, shape, like.dtype).to(like.device)


@torch.library.custom_op("shardc::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, draw: Tensor | None, causal: bool,
    scale: float, window: int, softcap: float, dropout: float, of_queries: Tensor | None = None,
    of_keys: Tensor | None = None, sees: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`softmax(scale * q @ k^T + mask) @ v` and the logsumexp of the scores.

    Returns the result `[*heads of q, q_length, value_dim]` and logsumexp. Rows that see nothing give zeros. A mask gets
    no gradient: RankError if it requires one.
    """
    out, logsumexp = parts.attention_in_parts(
        q, k, v, mask, sinks, draw, causal, scale, window, softcap, dropout, of_queries, of_keys, sees
    )
    inside = _heads_inside(q, out.shape[-1], mask, dropout)
    return _by_position(out) if inside else out.contiguous(), logsumexp.contiguous()


@torch.library.custom_op("shardc::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, draw: Tensor | None,
    out: Tensor, logsumexp: Tensor, causal: bool, scale: float, window: int, softcap: float, dropout: float,
    of_queries: Tensor | None = None, of_keys: Tensor | None = None, sees: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v and sinks from the gradient of `out`; `out` and `logsumexp` are what `attention`
    returned. Without sinks, their gradient is a zero `[1]`."""
    grads = parts.attention_in_parts_backward(
        grad, q, k, v, mask, sinks, draw, out, logsumexp, causal, scale, window, softcap, dropout,
        of_queries, of_keys, sees,
    )  # fmt: skip
    return _by_position(grads[0]), _by_position(grads[1]), _by_position(grads[2]), grads[3]


def _empty_by_position(x: Tensor, size: int | None = None) -> Tensor:
    *heads, length, width = x.shape
    shape = (heads[0], length, *heads[1:], width if size is None else size)
    return x.new_empty(shape).movedim(1, -2)


@attention_draw.register_fake
def _(like: Tensor, shape: Sequence[int]) -> Tensor:
    return like.new_empty(STATE, dtype=torch.uint8)


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, draw: Tensor | None, causal: bool,
    scale: float, window: int, softcap: float, dropout: float, of_queries: Tensor | None = None,
    of_keys: Tensor | None = None, sees: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    width = v.shape[-1]
    inside = _heads_inside(q, width, mask, dropout)
    out = _empty_by_position(q, width) if inside else q.new_empty((*q.shape[:-1], width))
    return out, q.new_empty(q.shape[:-1], dtype=compute_dtype(q.dtype))


@attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, draw: Tensor | None,
    out: Tensor, logsumexp: Tensor, causal: bool, scale: float, window: int, softcap: float, dropout: float,
    of_queries: Tensor | None = None, of_keys: Tensor | None = None, sees: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    made = (*q.shape[:-1], v.shape[-1])  # kernels read beyond what does not fit
    if tuple(grad.shape) != made or tuple(out.shape) != made or tuple(logsumexp.shape) != made[:-1]:
        raise RankError(
            f"shardc::attention returned {list(made)}; its backward got {list(grad.shape)} for the gradient"
        )
    grad_sinks = q.new_empty(1) if sinks is None else sinks.new_empty(sinks.shape)
    return _empty_by_position(q), _empty_by_position(k), _empty_by_position(v), grad_sinks


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, sinks, draw, *ctx.literals, of_queries, of_keys, ctx.sees = inputs
    if mask is not None and mask.requires_grad:
        raise RankError(
            "shardc::attention gives no gradient for its mask: detach it, or write attention with matmul and softmax"
        )
    ctx.save_for_backward(q, k, v, mask, sinks, draw, *output, of_queries, of_keys)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, of_queries, of_keys = ctx.saved_tensors
    function = () if of_queries is None else (of_queries, of_keys, ctx.sees)
    *grads, grad_sinks = attention_backward(grad, *saved, *ctx.literals, *function)
    return (*grads, None, None if saved[4] is None else grad_sinks, *[None] * 9)


def _second(ctx: Any, *grads: Tensor | None) -> None:
    raise RankError(
        "fused attention has no second derivative: call scaled_dot_product_attention under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


attention.register_autograd(_backward, setup_context=_setup)
attention_backward.register_autograd(_second)
# torch looks at every call of a custom operator for results that share memory with operands, which these never do
for _operator in (attention, attention_backward):
    torch.library.impl(_operator._qualname, ("cpu", "cuda"), _operator._init_fn)  # pyright: ignore
