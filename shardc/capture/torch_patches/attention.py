"""Attention during a trace: `F.scaled_dot_product_attention` as one operator, whatever kernel torch would pick.

F.scaled_dot_product_attention(q, k, v)    ->    %out, %lse = shardc.attention(%q, %k, %v, ...)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardc.capture.torch_patches.autocast import lowered
from shardc.runtime.kernels.attention import attention as fused_attention

_TORCH_ATTENTION = F.scaled_dot_product_attention


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """F.scaled_dot_product_attention as one operator forward and one backward. With dropout, broadcast batches, a mask
    that learns, a mask beside `is_causal`, or under `sdpa_kernel(SDPBackend.MATH)`, it is traced as matmuls and a
    softmax instead.

    The kernels that torch would pick depend on device and dropout, and a captured CPU kernel does not run elsewhere.
    """
    query, key, value, attn_mask = lowered(query), lowered(key), lowered(value), lowered(attn_mask)
    if not query.dtype == key.dtype == value.dtype:  # torch refuses this, and says so
        return _TORCH_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    heads = query.shape[-3] if query.ndim >= 3 else 1
    if enable_gqa and heads != key.shape[-3]:
        key, value = _repeat_heads(key, heads), _repeat_heads(value, heads)
    plain = query.ndim == key.ndim == value.ndim == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    free_mask = attn_mask is None or not (is_causal or attn_mask.requires_grad)
    if dropout_p == 0.0 and plain and free_mask and _fused():
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        return fused_attention(query, key, value, attn_mask, None, None, is_causal, scale, 0, 0.0, 0.0)[0]
    with sdpa_kernel(SDPBackend.MATH):
        return _TORCH_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)


def _fused() -> bool:
    """Whether the user left torch any kernel but the mathematics, which alone has a second derivative."""
    kernels = torch.backends.cuda
    return kernels.flash_sdp_enabled() or kernels.mem_efficient_sdp_enabled() or kernels.cudnn_sdp_enabled()


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """repeat_interleave of the heads, written so that ATen shows views and one copy."""
    *batch, kv_heads, length, size = x.shape
    return (
        x.unsqueeze(-3).expand(*batch, kv_heads, heads // kv_heads, length, size).reshape(*batch, heads, length, size)
    )
