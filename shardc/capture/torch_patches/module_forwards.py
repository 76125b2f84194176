"""What torch writes so that it does not trace, written so that it does: forwards of modules, and checkpointing.

nn.BatchNorm1d(8, momentum=None)       # the average counts the batches, in a tensor
nn.TransformerEncoder, in eval mode    # rows that are padding become zeros, if padding is at the end
checkpoint(part, x, use_reentrant=True)    # no gradients at all where x requires none
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

# the class of all batch norms, which torch does not export
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]


@contextmanager
def patched() -> Generator[None]:
    """Trace in here."""
    norm, encoder = _BatchNorm.forward, nn.TransformerEncoder.forward

    def norm_forward(self: Any, input: Tensor) -> Tensor:
        averages = self.training and self.track_running_stats and self.momentum is None
        return _average(self, input) if averages and self.num_batches_tracked is not None else norm(self, input)

    def encoder_forward(
        self: Any,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if src_key_padding_mask is None or mask is not None or not _nests(self, src):
            return encoder(self, src, mask, src_key_padding_mask, is_causal)
        last, self.norm = self.norm, None
        try:
            output = encoder(self, src, mask, src_key_padding_mask, is_causal)
        finally:
            self.norm = last
        output = _without_padding(output, src_key_padding_mask, getattr(self, "mask_check", True))
        return output if last is None else last(output)

    with ExitStack() as stack:
        stack.enter_context(patch.object(_BatchNorm, "forward", norm_forward))
        stack.enter_context(patch.object(nn.TransformerEncoder, "forward", encoder_forward))
        stack.enter_context(patch.object(torch.utils.checkpoint, "CheckpointFunction", _Reentrant))
        yield


class _Reentrant:
    """Checkpointing with `use_reentrant=True`, whose backward starts a backward of its own, which no trace does. The
    plan decides what is kept, so here the part just runs: as torch's, without gradients where no argument has one."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        torch.utils.checkpoint.check_backward_validity(args)
        able = any(isinstance(one, Tensor) and one.requires_grad for one in args)
        with torch.set_grad_enabled(torch.is_grad_enabled() and able):
            return function(*args)


def _average(norm: Any, input: Tensor) -> Tensor:
    """A batch norm whose running statistics are the means over all batches so far."""
    norm._check_input_dim(input)
    norm.num_batches_tracked.add_(1)
    mean, var = torch.zeros_like(norm.running_mean), torch.zeros_like(norm.running_var)
    output = F.batch_norm(input, mean, var, norm.weight, norm.bias, True, 1.0, norm.eps)
    with torch.no_grad():
        share = 1.0 / norm.num_batches_tracked.to(mean.dtype)
        norm.running_mean.mul_(1 - share).add_(mean * share)
        norm.running_var.mul_(1 - share).add_(var * share)
    return output


def _nests(encoder: Any, src: Tensor) -> bool:
    """Whether torch drops padding before the layers and fills in zeros after them, if padding is at the end."""
    first = encoder.layers[0]
    if not torch.backends.mha.get_fastpath_enabled() or not getattr(encoder, "use_nested_tensor", False):
        return False
    if first.training or src.dim() != 3 or torch.is_autocast_enabled():
        return False
    parts = (first.norm1, first.norm2, first.linear1, first.linear2, first.self_attn.out_proj)
    tensors = [src, first.self_attn.in_proj_weight, first.self_attn.in_proj_bias]
    tensors += [tensor for part in parts for tensor in (part.weight, part.bias)]
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _without_padding(output: Tensor, mask: Tensor, checked: bool) -> Tensor:
    padding = mask if mask.dtype is torch.bool else mask != 0
    if checked:
        padding = padding & (padding[:, 1:] >= padding[:, :-1]).all()
    return torch.where(padding.unsqueeze(-1), 0.0, output)
