"""What a sharded model cannot run on: tensors of a function transform, and tensors that are not plain and dense.

torch.func.vmap(model)(x)      # RankError: input 0 is a tensor of torch.func ...
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor

# functorch and autograd have no public way to ask whether a transform is active, or whether a tensor is one of its own.
from torch._C import _functorch  # pyright: ignore

from shardc.runtime.errors import RankError

_OUT = "differentiate its results with backward() or torch.autograd.grad, outside of the transform"


def refuse_transforms(named: Iterable[tuple[str, Tensor]]) -> None:
    """RankError if a transform of torch.func is active, or if one of the tensors cannot be sharded.

    `named` has what each tensor is to the user, and the tensor.
    """
    if _functorch.peek_interpreter_stack() is not None:
        raise RankError(
            f"a sharded model cannot run inside of a transform of torch.func (grad, vmap, jvp and the like): {_OUT}"
        )
    if torch._C._len_torch_dispatch_stack():
        raise RankError(
            "a sharded model runs in the middle of a TorchDispatchMode (FlopCounterMode and the like), which would see "
            "nothing of what its ranks do: call it outside of the mode"
        )
    for name, tensor in named:
        reason = _why_not(tensor)
        if reason:
            raise RankError(f"{name} {reason}")


def _why_not(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "is a nested tensor: pass a padded tensor and a mask instead"
    if tensor.layout is not torch.strided:
        return f"is stored as {tensor.layout}: pass it dense (to_dense())"
    if tensor.is_quantized:
        return "is a quantized tensor: pass its values (dequantize())"
    if is_batched(tensor):
        return f"is a batch of a vmap, in which a sharded model cannot run: {_OUT}"
    if _dual(tensor):
        return f"carries a tangent of forward-mode AD, which a sharded model does not compute: {_OUT}"
    return ""


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for many in a vmap: of torch.func, or of `is_grads_batched`."""
    keys = torch._C._dispatch_keys(tensor)  # pyright: ignore[reportPrivateUsage]
    return keys.has("Batched") or _functorch.is_functorch_wrapped_tensor(tensor)


def in_forward_mode() -> bool:
    """Whether forward-mode AD is on: then any tensor may carry a tangent."""
    return forward_mode._current_level >= 0  # pyright: ignore[reportPrivateUsage]


def _dual(tensor: Tensor) -> bool:
    return in_forward_mode() and forward_mode.unpack_dual(tensor).tangent is not None
