"""Random numbers that do not depend on the mesh: every rank draws the global tensor from the same stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardc.runtime.errors import RankError
from shardc.runtime.mesh import Context, current


def _generator(context: Context) -> torch.Generator:
    if context.generator is None:
        raise RankError("this run has no random generator: the generated module must say RANDOM = True")
    return context.generator


def bernoulli(
    shape: Sequence[int], keep_probability: float, *, dtype: torch.dtype, strides: Sequence[int] | None = None
) -> Tensor:
    """Ones with `keep_probability`, else zeros, of global `shape`: what dropout draws in eager mode on the CPU.

    The same numbers on all ranks and for every dtype (bool too); advances the run's generator as eager dropout does.
    Eager draws in the order in which dropout's input lies in memory: `strides` are those of that input where it is not
    contiguous. The result is contiguous in any case.
    """
    context = current()
    generator = _generator(context)
    if strides is None:
        mask = torch.empty(tuple(shape), dtype=dtype)
    else:
        mask = torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype)
    return mask.bernoulli_(keep_probability, generator=generator).contiguous().to(context.device)


def rand(shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """Uniform on [0, 1), of global `shape`: what `torch.rand` draws on the CPU."""
    context = current()
    return torch.rand(tuple(shape), dtype=dtype, generator=_generator(context)).to(context.device)


def randn(shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """Standard normal, of global `shape`: what `torch.randn` draws on the CPU."""
    context = current()
    return torch.randn(tuple(shape), dtype=dtype, generator=_generator(context)).to(context.device)
