"""Mixed precision: in which types a model computes, and in which gradients are summed over ranks.

param_dtype=torch.bfloat16, reduce_dtype=torch.float32

    %w = input                                   f32[512@dp, 512]          the parameter stays as it is
    %c = _to_copy(%w, dtype=bfloat16)            bf16[512@dp, 512]         the model computes with this
    ...
    %g = mm(%t, %x)                              bf16[512, 512] +sum@dp
    %s = gradient_cast(%g, float32, False)       f32[512, 512] +sum@dp     summed behind the cast
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """The types of `torch.distributed.fsdp.MixedPrecisionPolicy`, for a model as a whole: None leaves what there is."""

    parameters: torch.dtype | None = None
    """The type in which floating parameters are used."""
    reduce: torch.dtype | None = None
    """The type in which gradients of parameters are summed over ranks; without it, that of `parameters`."""
    outputs: torch.dtype | None = None
    inputs: bool = True
    """Whether floating inputs are cast to the type of parameters."""

    def of_parameter(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which a parameter of this type is used."""
        return self.parameters if self.parameters is not None and dtype.is_floating_point else dtype

    def of_input(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which the model gets an input of this type."""
        return self.of_parameter(dtype) if self.inputs else dtype

    @property
    def sums(self) -> torch.dtype | None:
        """The type in which gradients are summed; None where the planner may choose."""
        return self.reduce or self.parameters


@torch.library.custom_op("shardc::gradient_cast", mutates_args=())
def _gradient_cast(x: torch.Tensor, dtype: torch.dtype, summed: bool) -> torch.Tensor:
    """The cast of a gradient, before which addends of ranks are `summed`, or behind which."""
    return x.to(dtype, copy=True)


@_gradient_cast.register_fake
def _gradient_cast_fake(x: torch.Tensor, dtype: torch.dtype, summed: bool) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype)


GRADIENT_CAST = torch.ops.shardc.gradient_cast.default
RUNS_AS = {GRADIENT_CAST: torch.ops.aten._to_copy.default}
"""Operators that tell the planner more than they do, and what runs in their place."""
