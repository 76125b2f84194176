"""Attention: the operator, the kernels that run it piece by piece, and the bodies that run it in parts."""

from shardc.runtime.kernels.attention.operator import attention, attention_backward
from shardc.runtime.kernels.attention.parts import attention_in_parts, attention_in_parts_backward
from shardc.runtime.kernels.attention.ring import ring_attention, ring_attention_backward

__all__ = [
    "attention", "attention_backward", "attention_in_parts", "attention_in_parts_backward", "ring_attention",
    "ring_attention_backward",
]  # fmt: skip
