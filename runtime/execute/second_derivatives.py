"""Second derivatives of a sharded model: refused where they are asked for.

(grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)    # the gradient, as on one device
grad.norm().backward()                                                 # RankError: take it inside of forward
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from shardc.runtime.errors import RankError


def _refuse() -> NoReturn:
    raise RankError(
        "a sharded model has no second derivatives outside of its forward (create_graph=True): take the first "
        "derivative inside of forward, with torch.autograd.grad(..., create_graph=True), and return what needs it"
    )


class Second(torch.autograd.Function):
    """A number that depends on all tensors of a run, as second derivatives do; its own gradient is refused."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.count = len(tensors)
        ctx.set_materialize_grads(False)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, tangent: Tensor | None) -> tuple[None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if tangent is not None:  # in a first backward there is none
            _refuse()
        return (None,) * ctx.count


class _Once(torch.autograd.Function):
    """Gradients as they are, but differentiating them is refused. The first operands are what they depend on."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(gradient.detach() for gradient in tensors[-count:])

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        _refuse()


def once(gradients: Sequence[Tensor | None], second: Tensor, tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of a backward with `create_graph=True`: tied to the run (`second`) and to the tangents on which
    they depend, so that nobody takes them for constants."""
    there = [gradient for gradient in gradients if gradient is not None]
    if not there:
        return list(gradients)
    given = [tangent for tangent in tangents if tangent is not None]
    tied = iter(_Once.apply(len(there), second, *given, *there))
    return [None if gradient is None else next(tied) for gradient in gradients]
