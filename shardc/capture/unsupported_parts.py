"""Parts of a model that no trace can run, found before anything of the model is touched.

shard(nn.Sequential(torch.jit.script(encoder), head), mesh=...)   # CaptureError: module '0' is a ScriptModule ...
"""

from __future__ import annotations

from collections.abc import Collection
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from shardc.capture.user_frames import is_known
from shardc.errors import CaptureError


def refuse_scripted(module: nn.Module) -> None:
    """Raise CaptureError where a part of `module`, or itself, is a ScriptModule: its code is no Python, and its
    registries are copies."""
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise CaptureError(
                f"{_named(path)} is a ScriptModule (torch.jit.script or torch.jit.trace), which no trace can look "
                "into: build the model with the Python module that it was made from, and load its state_dict"
            )


def refuse_unsupported(module: nn.Module) -> None:
    """Raise CaptureError for a ScriptModule, and for a lazy module that has not met its first input yet."""
    if not any(isinstance(part, torch.jit.ScriptModule) or _lazy_names(part) for part in module.modules()):
        return  # every call asks, and paths take time
    refuse_scripted(module)
    for path, part in module.named_modules():
        for name in _lazy_names(part):
            raise CaptureError(
                f"{_named(path)} is lazy, and {name!r} has no shape yet: call the model once before you shard it"
            )


def _lazy_names(part: nn.Module) -> list[str]:
    held = (*part._parameters.items(), *part._buffers.items())
    return [name for name, tensor in held if tensor is not None and is_lazy(tensor)]


def _named(path: str) -> str:
    return f"module {path!r}" if path else "the model"


def refuse_replaced_methods(names: Collection[str]) -> None:
    """Raise CaptureError for a method of torch.Tensor that was replaced: torch itself calls it twice under a tracer."""
    for name, value in vars(Tensor).items():
        ours = not isinstance(value, FunctionType) or is_known(value.__code__.co_filename)
        if name in names and not ours and hasattr(torch._C.TensorBase, name):
            raise CaptureError(
                f"torch.Tensor.{name} was replaced by {value.__qualname__} of {value.__code__.co_filename}:"
                f"{value.__code__.co_firstlineno}, which torch calls otherwise while a model is traced: call a "
                "function of your own in forward"
            )
