"""One step of a compiled model beside the same step on a single device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from shardc.api import Inputs
from shardc.compiled import Compiled


@dataclass(frozen=True)
class Compared:
    """`what` was compared with one device, its `value` in words, and the largest `difference` of an element (NaN where
    one of two is missing). Of gradients, `worst` is the parameter whose gradient differs most."""

    what: str
    value: str
    difference: float
    worst: str = ""

    def __str__(self) -> str:
        if self.worst:
            return f"{self.what}: largest difference {self.difference:.1e} ({self.worst})"
        return f"{self.what}: {self.value}   largest difference to one device {self.difference:.1e}"


def compared(program: Compiled, model: nn.Module, single: nn.Module, inputs: Inputs) -> list[Compared]:
    """Run `program`, compiled from `model`, and `single`, a copy of `model`, and tell how far their outputs and
    gradients differ: an entry an output, and one for all gradients."""
    outputs, expected = _leaves(program, inputs), _leaves(single, inputs)
    tensors = [(a, b) for a, b in zip(outputs, expected, strict=True) if isinstance(a, Tensor)]
    lines = [
        Compared(f"output {index}", _summary(_whole(a)), _difference(a, b)) for index, (a, b) in enumerate(tensors)
    ]
    starts = _starts(program)
    if _backward(outputs, starts) and _backward(expected, starts):
        alone = dict(single.named_parameters())
        gradients = {
            name: _difference(parameter.grad, alone[name].grad)
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        if gradients:
            worst = max(gradients, key=gradients.__getitem__)
            lines.append(Compared(f"{len(gradients)} gradients", "", gradients[worst], worst))
    return lines


def step(program: Compiled, inputs: Inputs) -> None:
    """One forward, and one backward from all outputs from which the program's own starts."""
    _backward(_leaves(program, inputs), _starts(program))


def _starts(program: Compiled) -> list[int]:
    """Which leaves of the result backward starts from: all that have a gradient, or the loss alone."""
    return sorted(program.leaves_of(frozenset(slot.index for slot in program.executable.tangents)))


def _backward(leaves: Sequence[Any], starts: Sequence[int]) -> bool:
    """Run backward from the sum of some results; False if none has a gradient."""
    sums = [leaves[index].sum() for index in starts if leaves[index].requires_grad]
    if sums:
        torch.autograd.backward(sums)
    return bool(sums)


def _leaves(function: Callable[..., Any], inputs: Inputs) -> list[Any]:
    """The leaves of the result; what is random is drawn from the same seed in every call."""
    torch.manual_seed(1)
    result = function(**inputs) if isinstance(inputs, Mapping) else function(*inputs)
    return pytree.tree_leaves(result)


def _whole(tensor: Tensor) -> Tensor:
    """The global tensor, on this process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _difference(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float("nan")
    a, b = _whole(a).detach(), b.detach()
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def _summary(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.numel() == 1:
        return f"{kind} {tensor.item():.6f}"
    return f"{kind}{list(tensor.shape)} mean {tensor.double().mean().item():.6f}"
