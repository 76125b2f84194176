"""Attention during a trace: `F.scaled_dot_product_attention` as one operator, whatever kernel torch would pick.

F.scaled_dot_product_attention(q, k, v)                      ->    %out, %lse = shardc.attention(%q, %k, %v, ...)
F.scaled_dot_product_attention(q, repeat_kv(k, 4), ...)      ->    %out, %lse = shardc.attention(%grouped, %k, ...)

Keys and values that queries share are never repeated: queries get a dim of groups instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardc.capture.torch_patches.attention.notes import Notes, Repeated
from shardc.capture.torch_patches.autocast import lowered
from shardc.runtime.kernels.attention import attention as fused_attention
from shardc.runtime.kernels.attention.operator import attention_draw

SDPA = F.scaled_dot_product_attention


@dataclass(frozen=True)
class AttentionOptions:
    """What `shardc::attention` takes beside queries, keys and values. `dropout` and its `draw` stand together."""

    mask: Tensor | None = None
    sinks: Tensor | None = None
    draw: Tensor | None = None
    causal: bool = False
    scale: float = 1.0
    window: int = 0
    softcap: float = 0.0
    dropout: float = 0.0


def attention(
    notes: Notes, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention as one operator forward and one backward. With a mask that learns, where all
    weights are dropped, or under `sdpa_kernel(SDPBackend.MATH)`, it is traced as matmuls and a softmax instead.

    The kernels that torch would pick depend on device and dropout, and a captured CPU kernel does not run elsewhere.
    """
    whole = lowered(key), lowered(value)
    key, value, times = unrepeated(notes, key, value)
    query, key, value, attn_mask = lowered(query), lowered(key), lowered(value), lowered(attn_mask)
    if not (_fused() and 0 <= dropout_p < 1 and _fits(query, key, value, attn_mask, times, enable_gqa)):
        if enable_gqa and query.ndim > 2 and query.shape[-3] != whole[0].shape[-3] == whole[1].shape[-3]:
            whole = _repeated(whole[0], query.shape[-3]), _repeated(whole[1], query.shape[-3])
        with sdpa_kernel(SDPBackend.MATH):
            return SDPA(query, *whole, attn_mask, dropout_p, is_causal, scale=scale)
    options = AttentionOptions(
        attn_mask, causal=is_causal, scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale
    )
    if dropout_p > 0:
        batch = torch.broadcast_shapes(query.shape[:-2], (*key.shape[:-3], 1), (*value.shape[:-3], 1))
        shape = (*batch[: query.ndim - 2], query.shape[-2], key.shape[-2])
        options = replace(options, draw=attention_draw(query, shape), dropout=dropout_p)
    return attended(query, key, value, options)


def _fused() -> bool:
    """Whether the user left torch any kernel but the mathematics, which alone has a second derivative."""
    kernels = torch.backends.cuda
    return kernels.flash_sdp_enabled() or kernels.mem_efficient_sdp_enabled() or kernels.cudnn_sdp_enabled()


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, shared: int, grouped: bool) -> bool:
    """Whether the operator takes these; if not, torch computes it, or says what is wrong with it."""
    ranks, dtypes = {query.ndim, key.ndim, value.ndim}, {query.dtype, key.dtype, value.dtype}
    if len(dtypes) > 1 or not query.is_floating_point() or min(ranks) < 2 or len(ranks) > 1:
        return False
    sizes = query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]
    if query.ndim > 2:
        heads, keys, values = query.shape[-3], key.shape[-3] * shared, value.shape[-3] * shared
        sizes = sizes and keys == values and (heads == keys or 1 in (heads, keys) or (grouped and heads % keys == 0))
    if mask is None:
        return sizes
    fitting = mask.dtype in (torch.bool, query.dtype) and not mask.requires_grad
    return sizes and fitting and 2 <= mask.ndim <= max(query.ndim, 4)


def unrepeated(notes: Notes, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Keys and values without the repetition of their heads, and how often each head stood there."""
    first, second = notes.get(key, Repeated), notes.get(value, Repeated)
    if first is None or second is None or first.times != second.times:
        return key, value, 1
    heads = first.dim == key.ndim - 3 and second.dim == value.ndim - 3
    return (first.source, second.source, first.times) if heads else (key, value, 1)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """repeat_interleave of the heads, written so that ATen shows views and one copy."""
    *batch, shared, length, size = x.shape
    return x.unsqueeze(-3).expand(*batch, shared, heads // shared, length, size).reshape(*batch, heads, length, size)


def attended(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """`shardc::attention` of operands of any rank whose batches broadcast. Where k and v have fewer heads than q, each
    serves a group of them.

    Shapes: q `[..., heads, q_length, head_dim]`, k and v `[..., kv_heads, length, dim]`; result
    `[..., heads, q_length, value_dim]`. Without a dim of heads there is one.
    """
    single, rank = q.ndim == 2, max(q.ndim, 3)
    q, k, v = (x.unsqueeze(0) if single else x for x in (q, k, v))
    batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    heads, shared = max(q.shape[-3], k.shape[-3]), k.shape[-3]
    q = q if q.shape[-3] == heads else q.expand(*q.shape[:-3], heads, *q.shape[-2:])
    mask, sinks = options.mask, options.sinks
    q, k, v = (_batched(x, batch) for x in (q, k, v))
    mask = None if mask is None else _mask_of(mask, batch)
    if heads != shared:
        group = heads // shared
        q = q.unflatten(1, (shared, group))
        sinks = None if sinks is None else sinks.view(shared, group)
        if mask is not None and mask.ndim > 2:
            mask = mask.unsqueeze(-3) if mask.shape[-3] == 1 else mask.unflatten(-3, (shared, group))
    out, _ = fused_attention(
        q, k, v, mask, sinks, options.draw, options.causal, options.scale, options.window, options.softcap,
        options.dropout,
    )  # fmt: skip
    out = out.flatten(1, 2) if heads != shared else out
    if rank != 4:
        out = out.reshape(*batch, *out.shape[1:])
    return out.squeeze(0) if single else out


def _batched(x: Tensor, batch: torch.Size) -> Tensor:
    """`x` with one dim for the batch, of which it has every element."""
    x = x if x.shape[:-3] == batch else x.expand(*batch, *x.shape[-3:])
    return x if len(batch) == 1 else x.reshape(batch.numel(), *x.shape[-3:])


def _mask_of(mask: Tensor, batch: torch.Size) -> Tensor:
    """A mask for operands with one dim for the batch: of three dims less where it is the same for all of the batch."""
    if len(batch) == 1 or mask.ndim <= 3:
        return mask if len(batch) or mask.ndim < 4 else mask.reshape(mask.shape[-3:])
    own = mask.shape[:-3]
    return mask.reshape(1, *mask.shape[-3:]) if own.numel() == 1 else _batched(mask, batch)
