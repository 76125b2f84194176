"""A mixture of experts: the operator, the bodies that run it in parts, and the exchange of rows between ranks."""

from shardc.runtime.kernels.mixture.experts_parts import (
    experts_exchanged,
    experts_exchanged_backward,
    experts_in_parts,
    experts_in_parts_backward,
)
from shardc.runtime.kernels.mixture.fused import experts, experts_backward

__all__ = [
    "experts", "experts_backward", "experts_exchanged", "experts_exchanged_backward", "experts_in_parts",
    "experts_in_parts_backward",
]  # fmt: skip
