"""Random numbers that do not depend on the mesh: every rank draws the global tensor from the same stream.

Each function draws the same numbers as torch's function of that name on the CPU, from the run's generator, and advances
it as much. Operands and results are global tensors. With parts `d0`, `d1`, ... of the dims of that number, they are the
rank's part: every rank goes through the whole stream, block by block, and keeps its part.

All functions raise RankError in a run without a random generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardc.runtime.errors import RankError
from shardc.runtime.kernels.bernoulli import state_of_draw
from shardc.runtime.kernels.parts import Part, by_dim
from shardc.runtime.kernels.streams import Stream, filled
from shardc.runtime.mesh.mesh import TIME, Context, current

__all__ = [
    "attention_draw",
    "binomial",
    "draw",
    "multinomial",
    "poisson",
    "randperm",
    "rrelu",
    "sample_dirichlet",
    "standard_gamma",
]


def _generator(context: Context) -> torch.Generator:
    if context.generator is None:
        raise RankError("this run has no random generator: set RANDOM = True in the generated module")
    return context.generator


def draw(
    shape: Sequence[int],
    distribution: str,
    *parameters: float,
    dtype: torch.dtype,
    strides: Sequence[int] | None = None,
    batch: Sequence[tuple[int, int]] = (),
    **parts: Part,
) -> Tensor:
    """A tensor filled by torch's in-place method `distribution` ("uniform", "normal", "bernoulli", ...).

    `shape` is global. Eager mode draws in the order in which its result is laid out in memory. So `strides` are those
    of eager mode's result if it is not contiguous. The returned tensor is always contiguous.

    `batch` lists dims of which the micro-batch under way has a part, each with its size in all of the batch: there,
    `shape` is that of the part.
    """
    context, whole, ours = current(), list(shape), by_dim(parts)
    for dim, size in batch:
        part = ours.get(dim, Part((), shape[dim]))
        whole[dim], ours[dim] = size, Part((TIME, *part.axes), size, part.unit)
    stream = Stream(distribution, parameters, dtype, _generator(context))
    return filled(stream, whole, strides, ours).to(context.device)


def attention_draw(shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """What the dropout mask of attention scores of global `shape` is drawn from (see `shardc::attention_draw`)."""
    context = current()
    return state_of_draw(_generator(context), shape, dtype).to(context.device)


def randperm(count: int, *, dtype: torch.dtype) -> Tensor:
    """A permutation of 0 to `count` - 1."""
    context = current()
    return torch.randperm(count, dtype=dtype, generator=_generator(context)).to(context.device)


def multinomial(weights: Tensor, count: int, *, strides: Sequence[int], d0: Part | None = None) -> Tensor:
    """`count` indices a row, by weight, with replacement: `[rows, count]` from weights `[rows, choices]`.

    `strides`, here and below, are those of the operand in eager mode. With `d0`, weights and indices are the rank's
    part of the rows.
    """
    generator = _generator(current())
    if d0 is None:
        return torch.multinomial(_as_eager(weights, strides), count, True, generator=generator).to(weights.device)
    rows, result = weights[: d0.valid].cpu(), torch.zeros(d0.length, count, dtype=torch.int64)
    numbers, before = Stream("uniform", (0.0, 1.0), torch.float64, generator), min(d0.start, d0.size)
    numbers.skip(before * count)  # torch draws one number for every index
    if d0.valid:
        result[: d0.valid] = torch.multinomial(rows, count, True, generator=generator)
    numbers.skip((d0.size - before - d0.valid) * count)
    return result.to(weights.device)


def poisson(rates: Tensor, *, strides: Sequence[int]) -> Tensor:
    """Poisson numbers, of the shape of `rates`."""
    return torch.poisson(_as_eager(rates, strides), _generator(current())).contiguous().to(rates.device)


def binomial(counts: Tensor, chances: Tensor, *, strides: Sequence[int]) -> Tensor:
    """Numbers of successes in `counts` attempts. Both operands have the same shape and strides."""
    generator = _generator(current())
    successes = torch.binomial(_as_eager(counts, strides), _as_eager(chances, strides), generator)
    return successes.contiguous().to(counts.device)


def standard_gamma(shapes: Tensor, *, strides: Sequence[int]) -> Tensor:
    """Gamma samples with rate one, of the shape of `shapes`."""
    samples = torch.ops.aten._standard_gamma.default(_as_eager(shapes, strides), _generator(current()))
    return samples.contiguous().to(shapes.device)


def sample_dirichlet(concentrations: Tensor, *, strides: Sequence[int]) -> Tensor:
    """Dirichlet samples: the last dim of `concentrations` is that of the distribution."""
    samples = torch.ops.aten._sample_dirichlet.default(_as_eager(concentrations, strides), _generator(current()))
    return samples.contiguous().to(concentrations.device)


def rrelu(x: Tensor, lower: float, upper: float, *, strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A leaky relu and its slopes. Slopes are drawn where `x` is not positive, and one elsewhere."""
    operand, noise = _as_eager(x, strides), torch.empty(x.shape, dtype=x.dtype)
    result = torch.ops.aten.rrelu_with_noise.default(operand, noise, lower, upper, True, _generator(current()))
    return result.contiguous().to(x.device), noise.to(x.device)


def _as_eager(x: Tensor, strides: Sequence[int]) -> Tensor:
    """`x` on the CPU, with the strides of eager mode."""
    return torch.empty_strided(x.shape, tuple(strides), dtype=x.dtype).copy_(x)


DRAWS = frozenset(
    {attention_draw, draw, randperm, multinomial, poisson, binomial, standard_gamma, sample_dirichlet, rrelu}
)
"""The functions that advance the random stream."""
